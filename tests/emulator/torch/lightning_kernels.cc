// The kernels of tests/test_cuda_ops_lightning.py.
#include "kvk/device/check_values.cuh"
#include "kvk/device/lightning_decode.cuh"

KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<float>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<kvk::device::f16>);
// KVK_CHECK=1.
KVK_EMULATED_KERNEL(kvk::device::check_state_slots_kernel<512>);
