// The kernels of tests/test_cuda_ops_lightning*.py.
#include "kvk/device/check_values.cuh"
#include "kvk/device/lightning.cuh"
#include "kvk/device/lightning_decay.cuh"
#include "kvk/device/lightning_decode.cuh"

#define KVK_LIGHTNING(T, ...) \
  KVK_EMULATED_KERNEL(kvk::device::lightning_forward_kernel<kvk::device::LightningConfig<kvk::device::T, __VA_ARGS__>>)

// Two stages of a chunk, and one.
KVK_LIGHTNING(bf16, 32);
KVK_LIGHTNING(f16, 48);
KVK_LIGHTNING(bf16, 128);
KVK_LIGHTNING(f16, 256);

#define KVK_LIGHTNING_DECAY(T, DIM) \
  KVK_EMULATED_KERNEL(kvk::device::lightning_decay_kernel<kvk::device::LightningDecayConfig<kvk::device::T, DIM>>)

KVK_LIGHTNING_DECAY(bf16, 32);
KVK_LIGHTNING_DECAY(f16, 48);
KVK_LIGHTNING_DECAY(bf16, 128);
KVK_LIGHTNING_DECAY(f16, 128);
KVK_EMULATED_KERNEL(kvk::device::sum_parts_kernel<256>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<float>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<kvk::device::f16>);
// KVK_CHECK=1.
KVK_EMULATED_KERNEL(kvk::device::check_starts_kernel<512>);
KVK_EMULATED_KERNEL(kvk::device::check_state_slots_kernel<512>);
