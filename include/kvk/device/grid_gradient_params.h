// Parameters and shape of the gradients of attention over ordinary tensors; for the launch code and the kernels.
#pragma once

#include "kvk/device/grid_params.h"

namespace kvk::device {

// Rows are queries: grad_a is dq, row_b dO. Rows are keys: grad_a is dk, grad_b dv, row_b v, columns q and dO.
template <class Schedule>
struct GridGradientParams {
  GridOperands operands;
  GridView row_b;
  GridView state;           // fp32 pairs of a query: lse * log2(e), +inf where it saw no key, and delta
  GridView grad_a, grad_b;  // written
  typename Schedule::Params schedule;
};

// delta = rowsum(dO * O) - dlse, beside lse.
struct GridStateParams {
  GridView out, grad_out, lse, grad_lse;
  GridView state;             // written
  int32_t extent[kGridDims];  // of the grid of queries
  int32_t num_heads, head_dim_v;
};

struct GridGradientShape {
  static constexpr int kStages = 2;

  int dim, dim_v, pitch, pitch_v;  // as PagedPrefillShape's
  int warps;                       // of 16 rows: the gradients of more, beside two sums, would spill
  int rows, keys;
  int column_bytes;
  size_t schedule_bytes = 0;

  template <class ScheduleBytes>
  KVK_HOST_DEVICE constexpr GridGradientShape(int head_dim, int head_dim_v, bool rows_are_keys, bool small,
                                              ScheduleBytes&& bytes)
      : dim(round_up(head_dim, 16)), dim_v(round_up(head_dim_v, 16)), pitch(dim + 8), pitch_v(dim_v + 8), warps(4),
        rows(64), keys(dim + dim_v <= 128 ? 64 : 32),
        column_bytes(rows_are_keys ? sizeof(GridQueryColumn) : sizeof(GridColumn)) {
    schedule_bytes = bytes(rows, keys);
    if (small && shared_bytes() > kSmallShared) {
      warps = 2;
      rows = 32;
      keys = 16;
      schedule_bytes = bytes(rows, keys);
    }
  }

  KVK_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    const size_t elements = size_t(rows + kStages * keys) * (pitch + pitch_v);
    return elements * 2 + size_t(kStages) * keys * column_bytes + size_t(rows) * sizeof(GridPlace) + schedule_bytes;
  }
};

template <bool kIsQuery>
struct GridColumnOf {
  using Type = GridColumn;
};
template <>
struct GridColumnOf<true> {
  using Type = GridQueryColumn;
};

// Which gradients of its rows a pass makes: with wide heads the sums of both would spill.
enum GridGradientOf : uint32_t { kGradA = 1, kGradB = 2 };

template <class T_, int kHeadDim_, int kHeadDimV_, class Schedule_, bool kRowsAreKeys_, uint32_t kGrads_,
          uint32_t kParts_ = 0, bool kSmall_ = false>
struct GridGradientConfig {
  using T = T_;
  using Schedule = Schedule_;
  using Params = GridGradientParams<Schedule_>;
  using Column = typename GridColumnOf<kRowsAreKeys_>::Type;
  static constexpr bool kRowsAreKeys = kRowsAreKeys_;
  static_assert(kRowsAreKeys || kGrads_ == kGradA);
  static constexpr uint32_t kGrads = kGrads_, kParts = kParts_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr GridGradientShape kShape =
      GridGradientShape(kHeadDim_, kHeadDimV_, kRowsAreKeys_, kSmall_, &Schedule_::shared_bytes);
  static constexpr int kWarps = kShape.warps, kThreads = 32 * kWarps, kStages = kShape.kStages;
  static constexpr int kDim = kShape.dim, kDimV = kShape.dim_v, kPitch = kShape.pitch, kPitchV = kShape.pitch_v;
  static constexpr int kRowTiles = 1, kWarpRows = 16, kRows = kShape.rows, kKeys = kShape.keys;
};
}  // namespace kvk::device
