// Parameters and shape of the decode kernels; for the launch code and the kernels.
#pragma once

#include "kvk/device/page_format.h"
#include "kvk/device/paged_problem.h"
#include "kvk/device/split.h"

namespace kvk::device {

struct PagedDecodeParams {
  PagedProblem problem;
  // Results of single splits, [num_requests * num_kv_heads][partial_rows][split_slots]; requests of one split use none.
  float* partial_out;    // [.., head_dim_v]
  float* partial_state;  // [.., 2]: maximum (of scores times log2 e) and sum
  int32_t partial_rows;  // query rows per kv head of a streamed request, at most
  int32_t split_slots;   // splits of a request, at most
  int32_t row_tiles;     // tiles of kRows rows in partial_rows
};

// Sizes that follow from the head dims; the kernel uses them as constants, the launch code to ask for shared memory.
struct PagedDecodeShape {
  static constexpr int kKeys = 16;  // keys of one warp's tile: the k of its P.V product

  int warps;
  int rows;            // query rows of a block: 8 or 16
  int dim, dim_v;      // mma works on 16 columns at a time; the padding is filled with zeros
  int pitch, pitch_v;  // of a row in shared memory, elements: an odd number of 16-byte chunks, so that the 8 rows of an
                       // ldmatrix fall into different banks
  int stages;
  StagedBytes staged;

  // small: for cards that give a block 99 KiB (sm_86, sm_89, sm_120), where the usual shape wants more. staged: of kKeys keys.
  KVK_HOST_DEVICE constexpr PagedDecodeShape(int head_dim, int head_dim_v, int halves, bool small = false,
                                             StagedBytes staged_bytes = {})
      : warps(4), rows(8 * halves), dim(round_up(head_dim, 16)), dim_v(round_up(head_dim_v, 16)), pitch(dim + 8),
        pitch_v(dim_v + 8), stages(0), staged(staged_bytes) {
    // As many stages as let two blocks fit beside each other on an SM (106 KiB each), at least 2 and at most 6: with head
    // dim 128, 3 stages of 4 warps keep over 100 KiB in flight on an SM; the latency of HBM wants about 40.
    const int room = small ? 84 * 1024 : 106 * 1024;
    if (small && room < warps * (fixed_bytes() + 2 * stage_bytes())) warps = 2;
    const int fit = (room / warps - fixed_bytes()) / stage_bytes();
    stages = fit < 2 ? 2 : fit > 6 ? 6 : fit;
  }

  KVK_HOST_DEVICE constexpr int threads() const { return 32 * warps; }

  KVK_HOST_DEVICE constexpr bool expands() const { return staged.records > 0; }
  KVK_HOST_DEVICE constexpr int tile_elements() const { return kKeys * (pitch + pitch_v); }  // K and V of one tile
  // Of one warp.
  KVK_HOST_DEVICE constexpr int stage_bytes() const {
    return expands() ? staged.records + kKeys * staged.place : tile_elements() * 2;
  }
  KVK_HOST_DEVICE constexpr int fixed_bytes() const { return expands() ? tile_elements() * 2 + staged.scratch : 0; }
  KVK_HOST_DEVICE constexpr int ring_bytes() const {
    const int ring = stages * (expands() ? staged.records : tile_elements() * 2), out = rows * dim_v * 4;
    return ring > out ? ring : out;  // a warp's rows take its place in the end
  }
  KVK_HOST_DEVICE constexpr size_t slots() const { return size_t(warps) * stages * kKeys; }  // keys in the rings
  KVK_HOST_DEVICE constexpr size_t query_elements() const { return size_t(16) * staged.query_terms * pitch; }
  KVK_HOST_DEVICE constexpr size_t states() const { return size_t(warps) * rows; }

  // In the order in which the kernel takes its parts.
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    size_t bytes = size_t(warps) * ring_bytes();
    bytes = round_up<size_t>(bytes, 16) + slots() * (expands() ? staged.place : sizeof(float));
    if (expands()) {
      bytes = round_up<size_t>(bytes, 16) + size_t(warps) * tile_elements() * 2;
      bytes = round_up<size_t>(bytes, 16) + size_t(warps) * staged.scratch;
    }
    bytes = round_up<size_t>(bytes, 16) + query_elements() * 2;
    return round_up<size_t>(bytes, 16) + states() * 2 * sizeof(float);
  }
};

// kParts: the ScoreParts the kernel is compiled with. kHalves: 1 for up to 8 query rows a kv head, 2 for more (several tiles
// of 16 where a group is larger).
template <class T_, int kHeadDim_, int kHeadDimV_, int kHalves_, uint32_t kParts_, bool kSmall_ = false,
          class Pages_ = DensePages>
struct PagedDecodeConfig {
  using T = T_;
  using Pages = Pages_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_, kHalves = kHalves_;
  static constexpr uint32_t kParts = kParts_;
  static constexpr PagedDecodeShape kShape = PagedDecodeShape(
      kHeadDim_, kHeadDimV_, kHalves_, kSmall_, Pages_::staged(kHeadDim_, kHeadDimV_, PagedDecodeShape::kKeys));
  static constexpr int kWarps = kShape.warps, kThreads = kShape.threads(), kKeys = kShape.kKeys, kRows = kShape.rows;
  static constexpr int kDim = kShape.dim, kDimV = kShape.dim_v, kPitch = kShape.pitch, kPitchV = kShape.pitch_v;
  static constexpr int kStages = kShape.stages;
  // Queries stay in registers where there is room for them beside the output.
  static constexpr int kQueryTerms = kShape.staged.query_terms;
  static constexpr bool kQueriesInRegisters = kDim <= 128 && kQueryTerms == 1;
};

}  // namespace kvk::device
