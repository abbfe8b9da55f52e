// Launch code of hadamard.
#include <algorithm>
#include <cmath>

#include "cuda/launch.h"

namespace kvk::cuda {

Kernel hadamard_kernel(DType dtype, int64_t n, bool transpose) {
  // Matrices of order 1 and 12 are symmetric.
  const bool transposed = transpose && device::hadamard_order(n) > 12;
  return {"kvk/device/hadamard.cuh", "kvk::device::hadamard_kernel<kvk::device::HadamardConfig<" + kernel_type(dtype) +
                                         ", " + std::to_string(n) + ", " + (transposed ? "true" : "false") + ">>"};
}

device::RowGrid row_grid(const Tensor& t, int trailing) {
  device::RowGrid grid = {};
  for (int i = 0; i + trailing < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    const int last = grid.ndim - 1;
    if (last >= 0 && grid.stride[last] == t.shape[i] * t.stride[i]) {  // one dimension more would cost a division
      grid.shape[last] *= t.shape[i];
      grid.stride[last] = t.stride[i];
    } else {
      grid.shape[grid.ndim] = t.shape[i];
      grid.stride[grid.ndim++] = t.stride[i];
    }
  }
  return grid;
}

void launch_hadamard(const HadamardArgs& args, Launcher& launcher) {
  const int64_t n = args.x.shape[args.x.ndim - 1];
  device::HadamardParams params = {};
  params.x = args.x.data;
  params.out = args.out.data;
  params.x_rows = row_grid(args.x, 1);
  params.out_rows = row_grid(args.out, 1);
  params.num_rows = args.x.numel() / n;
  params.scale = static_cast<float>(args.scale.value_or(1.0 / std::sqrt(static_cast<double>(n))));
  params.vectors = rows_on_16_bytes(args.x) && rows_on_16_bytes(args.out);
  const device::HadamardShape shape(static_cast<int>(n));
  const int64_t blocks = shape.flat() ? device::ceil_div<int64_t>(params.num_rows * (n / shape.per), shape.threads)
                                      : device::ceil_div<int64_t>(params.num_rows, shape.rows);
  launch(launcher, hadamard_kernel(args.x.dtype, n, args.transpose), {grid_size(blocks), 1, 1},
         static_cast<uint32_t>(shape.threads), shape.shared_bytes(), params);
}

}  // namespace kvk::cuda
