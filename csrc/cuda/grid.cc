#include "cuda/grid.h"

#include <algorithm>
#include <utility>

namespace kvk::cuda {
namespace {

Kernel state_kernel(DType dtype) {
  return {"kvk/device/grid_gradient.cuh", "kvk::device::grid_state_kernel<" + kernel_type(dtype) + ">"};
}

}  // namespace

device::GridView launch_grid_state(const GridProblem& p, const int64_t (&extent)[device::kGridDims], Launcher& launcher,
                                   Workspace& workspace) {
  device::GridStateParams params = {};
  params.out = p.out;
  params.grad_out = p.grad_out;
  params.lse = p.lse;
  params.grad_lse = p.grad_lse;
  params.num_heads = p.num_kv_heads * p.group;
  params.head_dim_v = p.head_dim_v;
  int64_t stride = 2 * int64_t{params.num_heads};
  for (int d = device::kGridDims - 1; d >= 0; --d) {
    params.extent[d] = static_cast<int32_t>(extent[d]);
    params.state.stride[d] = stride;
    stride *= extent[d];
  }
  params.state.head_stride = 2;
  params.state.data = workspace.allocate(std::max<int64_t>(2, stride) * static_cast<int64_t>(sizeof(float)));
  launch(launcher, state_kernel(p.dtype), {static_cast<uint32_t>(device::ceil_div<int64_t>(stride / 2, 4)), 1, 1}, 128,
         0, params);
  return params.state;
}

std::vector<Kernel> default_grid_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const bool small : {false, true}) kernels.push_back(grid_kernel("BlockSparse", dtype, 128, 128, 0, small));
    kernels.push_back(grid_kernel("Neighborhood", dtype, 64, 64, 0, false));
    for (const auto& [schedule, dim] : {std::pair("BlockSparse", 128), {"Neighborhood", 64}}) {
      for (const GridPass& pass : gradient_passes(dim, dim)) {
        kernels.push_back(gradient_kernel(schedule, dtype, dim, dim, pass, 0, false));
      }
    }
    kernels.push_back(state_kernel(dtype));
  }
  kernels.push_back(transpose_kernel());
  return kernels;
}

}  // namespace kvk::cuda
