// Parameters and shape of the prefill kernel; for the launch code and the kernel.
#pragma once

#include "kvk/device/page_format.h"
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
  StagedBytes staged;

  // small: for cards that give a block 99 KiB (sm_86, sm_89, sm_120), where the usual shape wants more.
  // staged: a function of the number of keys of a run.
  template <class Staged>
  KVK_HOST_DEVICE constexpr PagedPrefillShape(int head_dim, int head_dim_v, bool small, Staged&& staged_bytes)
      : dim(round_up(head_dim, 16)), dim_v(round_up(head_dim_v, 16)), pitch(dim + 8), pitch_v(dim_v + 8),
        row_tiles(small || dim > 128 || dim_v > 128 ? 1 : 2), rows(kWarps * 16 * row_tiles), keys(32 * row_tiles) {
    staged = staged_bytes(keys);
    if (small && shared_bytes() > kSmallShared) {
      keys = 16;
      staged = staged_bytes(keys);
    }
  }
  KVK_HOST_DEVICE constexpr PagedPrefillShape(int head_dim, int head_dim_v, bool small = false)
      : PagedPrefillShape(head_dim, head_dim_v, small, [](int) { return StagedBytes(); }) {}

  KVK_HOST_DEVICE constexpr bool expands() const { return staged.records > 0; }
  KVK_HOST_DEVICE constexpr int tiles() const { return expands() ? 1 : kStages; }  // of K and V in the element type

  KVK_HOST_DEVICE constexpr size_t query_elements() const { return size_t(rows) * staged.query_terms * pitch; }
  KVK_HOST_DEVICE constexpr size_t k_elements() const { return size_t(keys) * pitch; }
  KVK_HOST_DEVICE constexpr size_t v_elements() const { return size_t(keys) * pitch_v; }

  // In the order in which the kernel takes its parts; all are multiples of 16 bytes.
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    const size_t places = size_t(kStages) * keys * (expands() ? staged.place : kPlaceBytes);
    const size_t records = expands() ? size_t(kStages) * staged.records + size_t(kWarps) * staged.scratch : 0;
    return (query_elements() + tiles() * (k_elements() + v_elements())) * 2 + records + places + kItemBytes;
  }
};

// A format's staged bytes by the number of keys.
template <class Pages>
struct StagedOf {
  int head_dim, head_dim_v;
  KVK_HOST_DEVICE constexpr StagedBytes operator()(int keys) const { return Pages::staged(head_dim, head_dim_v, keys); }
};

template <class T_, int kHeadDim_, int kHeadDimV_, uint32_t kParts_, bool kSmall_ = false, class Pages_ = DensePages>
struct PagedPrefillConfig {
  using T = T_;
  using Pages = Pages_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr uint32_t kParts = kParts_;
  static constexpr PagedPrefillShape kShape =
      PagedPrefillShape(kHeadDim_, kHeadDimV_, kSmall_, StagedOf<Pages_>{kHeadDim_, kHeadDimV_});
  static constexpr int kWarps = kShape.kWarps, kThreads = kShape.kThreads, kStages = kShape.kStages;
  static constexpr int kDim = kShape.dim, kDimV = kShape.dim_v, kPitch = kShape.pitch, kPitchV = kShape.pitch_v;
  static constexpr int kRowTiles = kShape.row_tiles, kWarpRows = 16 * kRowTiles, kRows = kShape.rows;
  static constexpr int kKeys = kShape.keys;
  static constexpr int kQueryTerms = kShape.staged.query_terms;
};

}  // namespace kvk::device
