// Parameters and shapes of attention over ordinary tensors and its gradient; for the launch code and the kernels.
//
// Which columns a tile of rows visits and which of them each row sees is a schedule, a struct that the kernels take, with
//   Params                       what its pattern is
//   shared_bytes(rows, keys)     of Walk
//   Walk<Config>                 a block's way through its columns (block_sparse_walk.cuh, neighborhood_walk.cuh)
#pragma once

#include "kvk/device/grid_view.h"
#include "kvk/device/paged_prefill_params.h"

namespace kvk::device {

// One token of one head.
struct GridPlace {
  int32_t at[kGridDims];
  int32_t head;
  int32_t sight;  // the schedule's word for what a row sees, or where a column lies
};

// A column of a tile, where its rows of two tensors begin.
struct GridColumn {
  int64_t a, b;  // element offsets; kNoRow: there is no such column
  float bias;
  int32_t sight;
};
// One that is a query, in the gradient of keys and values.
struct GridQueryColumn : GridColumn {
  float lse, delta;
};

// Rows against columns: queries against keys and values, or the other way round.
struct GridOperands {
  GridView row_a, column_a, column_b;
  int32_t num_kv_heads, group;  // group: query heads of one kv head
  float softmax_scale;
};

template <class Schedule>
struct GridAttentionParams {
  GridOperands operands;  // q, k, v
  GridView out, lse;      // written; lse fp32
  typename Schedule::Params schedule;
};

struct GridShape : PagedPrefillShape {
  size_t schedule_bytes = 0;

  template <class ScheduleBytes>
  KVK_HOST_DEVICE constexpr GridShape(int head_dim, int head_dim_v, bool small, ScheduleBytes&& bytes)
      : PagedPrefillShape(head_dim, head_dim_v, small), schedule_bytes(bytes(rows, keys)) {}

  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    return PagedPrefillShape::shared_bytes() - kItemBytes + size_t(rows) * sizeof(GridPlace) + schedule_bytes;
  }
};

// small: tiles of 64 rows, for cards that give a block 99 KiB where the usual shape wants more, and for patterns that leave
// more rows empty.
template <class T_, int kHeadDim_, int kHeadDimV_, class Schedule_, uint32_t kParts_ = 0, bool kSmall_ = false>
struct GridConfig {
  using T = T_;
  using Schedule = Schedule_;
  using Params = GridAttentionParams<Schedule_>;
  using Column = GridColumn;
  static_assert(sizeof(Column) == PagedPrefillShape::kPlaceBytes);
  static constexpr bool kRowsAreKeys = false;
  static constexpr uint32_t kParts = kParts_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr GridShape kShape = GridShape(kHeadDim_, kHeadDimV_, kSmall_, &Schedule_::shared_bytes);
  static constexpr int kWarps = kShape.kWarps, kThreads = kShape.kThreads, kStages = kShape.kStages;
  static constexpr int kDim = kShape.dim, kDimV = kShape.dim_v, kPitch = kShape.pitch, kPitchV = kShape.pitch_v;
  static constexpr int kRowTiles = kShape.row_tiles, kWarpRows = 16 * kRowTiles, kRows = kShape.rows;
  static constexpr int kKeys = kShape.keys, kQueryTerms = 1;
};

}  // namespace kvk::device
