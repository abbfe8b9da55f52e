// Launch code that the families of attention over ordinary tensors share.
#pragma once

#include <string>

#include "core/grid_problem.h"
#include "cuda/launch.h"
#include "kvk/device/block_sparse_params.h"
#include "kvk/device/grid_params.h"

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

device::BlockSparseParams pattern_params(const BlockSparseProblem& p);

}  // namespace kvk::cuda
