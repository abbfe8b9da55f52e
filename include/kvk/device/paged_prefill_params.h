// Parameters and shape of the prefill kernel; for the launch code and the kernel.
#pragma once

#include "kvk/device/paged_problem.h"
#include "kvk/device/split.h"

namespace kvk::device {

struct PagedPrefillParams {
  PagedProblem problem;
};

inline constexpr size_t kSmallShared = 99 * 1024;

// Sizes that follow from the head dims; the kernel uses them as constants, the launch code to ask for shared memory.
struct PagedPrefillShape {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 2;
  static constexpr int kPlaceBytes = 24, kItemBytes = 48;  // sizeof(KeyPlace), sizeof(PagedItem)

  int dim, dim_v;      // mma works on 16 columns at a time; the padding is filled with zeros
  int pitch, pitch_v;  // of a row in shared memory, elements; keeps ldmatrix free of bank conflicts
  int row_tiles;   // of 16 rows, of a warp. Two halve what a warp reads of K and V from shared memory per multiply-add;
                   // with wide values the output of one already takes 128 registers
  int rows, keys;  // of a block. Up to head dim 128 two blocks fit beside each other (105 KiB each)

  // small: for cards that give a block 99 KiB (sm_86, sm_89, sm_120), where the usual shape wants more.
  KVK_HOST_DEVICE constexpr PagedPrefillShape(int head_dim, int head_dim_v, bool small = false)
      : dim(round_up(head_dim, 16)), dim_v(round_up(head_dim_v, 16)), pitch(dim + 8), pitch_v(dim_v + 8),
        row_tiles(small || dim > 128 || dim_v > 128 ? 1 : 2), rows(kWarps * 16 * row_tiles), keys(32 * row_tiles) {
    if (small && shared_bytes() > kSmallShared) keys = 16;
  }

  KVK_HOST_DEVICE constexpr size_t query_elements() const { return size_t(rows) * pitch; }
  KVK_HOST_DEVICE constexpr size_t k_elements() const { return size_t(keys) * pitch; }
  KVK_HOST_DEVICE constexpr size_t v_elements() const { return size_t(keys) * pitch_v; }

  // In the order in which the kernel takes its parts; all are multiples of 16 bytes.
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    return (query_elements() + kStages * (k_elements() + v_elements())) * 2 + size_t(kStages) * keys * kPlaceBytes +
           kItemBytes;
  }
};

template <class T_, int kHeadDim_, int kHeadDimV_, uint32_t kParts_, bool kSmall_ = false>
struct PagedPrefillConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr uint32_t kParts = kParts_;
  static constexpr PagedPrefillShape kShape = PagedPrefillShape(kHeadDim_, kHeadDimV_, kSmall_);
  static constexpr int kWarps = kShape.kWarps, kThreads = kShape.kThreads, kStages = kShape.kStages;
  static constexpr int kDim = kShape.dim, kDimV = kShape.dim_v, kPitch = kShape.pitch, kPitchV = kShape.pitch_v;
  static constexpr int kRowTiles = kShape.row_tiles, kWarpRows = 16 * kRowTiles, kRows = kShape.rows;
  static constexpr int kKeys = kShape.keys;
};

}  // namespace kvk::device
