// Launch code that the families of attention over ordinary tensors share.
#pragma once

#include <string>
#include <vector>

#include "core/grid_problem.h"
#include "cuda/launch.h"
#include "kvk/device/block_sparse_params.h"
#include "kvk/device/grid_gradient_params.h"

namespace kvk::cuda {

template <class Schedule>
device::GridShape grid_shape(const GridProblem& p, bool small) {
  return device::GridShape(p.head_dim, p.head_dim_v, small, &Schedule::shared_bytes);
}

// Whether a block of the usual shape is too large for the card.
template <class Schedule>
bool needs_small_grid(const GridProblem& p, const Launcher& launcher) {
  return grid_shape<Schedule>(p, false).shared_bytes() >
         static_cast<size_t>(launcher.properties().max_shared_per_block);
}

// schedule: as the kernels name it.
inline Kernel grid_kernel(const char* schedule, DType dtype, int head_dim, int head_dim_v, uint32_t parts, bool small) {
  return {"kvk/device/grid.cuh", "kvk::device::grid_attention_kernel<kvk::device::GridConfig<" + kernel_type(dtype) +
                                     ", " + std::to_string(head_dim) + ", " + std::to_string(head_dim_v) +
                                     ", kvk::device::" + schedule + ", " + std::to_string(parts) +
                                     (small ? ", true>>" : ">>")};
}

template <class Schedule>
device::GridAttentionParams<Schedule> grid_params(const GridProblem& p) {
  device::GridAttentionParams<Schedule> params = {};
  params.operands = {p.q, p.k, p.v, p.num_kv_heads, p.group, p.softmax_scale};
  params.out = p.out;
  params.lse = p.lse;
  return params;
}

// The passes of a gradient: dq; then dk and dv, in passes of their own where the sums of both would not fit the registers.
struct GridPass {
  bool rows_are_keys;
  uint32_t grads;  // device::GridGradientOf
};
inline std::vector<GridPass> gradient_passes(int head_dim, int head_dim_v) {
  if (head_dim <= 128 && head_dim_v <= 128) return {{false, 1}, {true, 3}};
  return {{false, 1}, {true, 1}, {true, 2}};
}

template <class Schedule>
device::GridGradientShape gradient_shape(const GridProblem& p, bool rows_are_keys, bool small) {
  return device::GridGradientShape(p.head_dim, p.head_dim_v, rows_are_keys, small, &Schedule::shared_bytes);
}

inline Kernel gradient_kernel(const char* schedule, DType dtype, int head_dim, int head_dim_v, const GridPass& pass,
                              uint32_t parts, bool small) {
  return {"kvk/device/grid_gradient.cuh",
          "kvk::device::grid_gradient_kernel<kvk::device::GridGradientConfig<" + kernel_type(dtype) + ", " +
              std::to_string(head_dim) + ", " + std::to_string(head_dim_v) + ", kvk::device::" + schedule +
              (pass.rows_are_keys ? ", true, " : ", false, ") + std::to_string(pass.grads) + ", " +
              std::to_string(parts) + (small ? ", true>>" : ">>")};
}

// lse and delta of every query of a grid of `extent` tokens, in new memory.
device::GridView launch_grid_state(const GridProblem& p, const int64_t (&extent)[device::kGridDims], Launcher& launcher,
                                   Workspace& workspace);

// Both gradients of every pass. walk(pass, shape, params.schedule): the grid, with what the schedule is.
template <class Schedule, class Walk>
void launch_gradients(const char* schedule, const GridProblem& p, const device::GridView& state, uint32_t parts,
                      Launcher& launcher, Walk&& walk) {
  for (const GridPass& pass : gradient_passes(p.head_dim, p.head_dim_v)) {
    const bool small = gradient_shape<Schedule>(p, pass.rows_are_keys, false).shared_bytes() >
                       static_cast<size_t>(launcher.properties().max_shared_per_block);
    const device::GridGradientShape shape = gradient_shape<Schedule>(p, pass.rows_are_keys, small);
    device::GridGradientParams<Schedule> params = {};
    params.state = state;
    if (pass.rows_are_keys) {
      params.operands = {p.k, p.q, p.grad_out, p.num_kv_heads, p.group, p.softmax_scale};
      params.row_b = p.v;
      params.grad_a = p.dk;
      params.grad_b = p.dv;
    } else {
      params.operands = {p.q, p.k, p.v, p.num_kv_heads, p.group, p.softmax_scale};
      params.row_b = p.grad_out;
      params.grad_a = p.dq;
    }
    const Dim3 grid = walk(pass, shape, params.schedule);
    launch(launcher, gradient_kernel(schedule, p.dtype, p.head_dim, p.head_dim_v, pass, parts, small), grid,
           static_cast<uint32_t>(shape.threads()), shape.shared_bytes(), params);
  }
}

// The parameters of a pattern as it lies, not transposed.
device::BlockSparseParams pattern_params(const BlockSparseProblem& p);

Kernel transpose_kernel();

}  // namespace kvk::cuda
