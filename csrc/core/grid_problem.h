// The checked problem of attention over ordinary tensors, forward and backward: what block-sparse, vertical-slash and
// neighborhood attention share. Tokens lie on a grid of a batch and up to three dimensions; packed sequences use the last.
#pragma once

#include <cstdint>

#include "kvk/device/grid_view.h"
#include "kvk/types.h"

namespace kvk {

using device::GridView;
using device::kGridDims;

// t[T, H(, D)]: tokens are the last dimension of the grid.
inline GridView packed_view(const Tensor& t) { return {t.data, {0, 0, 0, t.stride[0]}, t.stride[1]}; }

struct GridProblem {
  DType dtype = DType::f32;
  int32_t num_kv_heads = 0, group = 0;  // group: query heads of one kv head
  int32_t head_dim = 0, head_dim_v = 0;
  float softmax_scale = 1.0f;
  GridView q, k, v, out;
  GridView lse;  // f32, without a head dim
  // The gradient alone; out and lse are then read.
  GridView grad_out, grad_lse, dq, dk, dv;
};

}  // namespace kvk
