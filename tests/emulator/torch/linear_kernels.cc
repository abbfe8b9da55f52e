// The kernels of tests/test_cuda_ops_linear.py.
#include "kvk/device/linear.cuh"
#include "kvk/device/linear_sums.cuh"

#define KVK_LINEAR(T, DIM, FLOATS) \
  KVK_EMULATED_KERNEL(kvk::device::linear_forward_kernel<kvk::device::LinearConfig<kvk::device::T, DIM, FLOATS>>)

KVK_LINEAR(bf16, 32, false);
KVK_LINEAR(bf16, 32, true);
KVK_LINEAR(f16, 48, false);
KVK_LINEAR(f16, 48, true);
KVK_LINEAR(bf16, 160, false);
KVK_LINEAR(bf16, 160, true);

KVK_EMULATED_KERNEL(kvk::device::linear_sums_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::linear_sums_kernel<kvk::device::f16>);
