// The prefill kernels of tests/test_emulated_ops.py, those of append_kv and merge_states, and of KVK_CHECK=1.
#include "emulator/paged_kernels.h"
#include "kvk/device/append_kv.cuh"
#include "kvk/device/check_values.cuh"
#include "kvk/device/merge_states.cuh"

KVK_PREFILL(kvk::device::bf16, 64, 64, 0);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 64>);

// f16, D 32, Dv 40: soft cap 1, ALiBi 2, key bias 4, tree mask 8.
KVK_PREFILL(kvk::device::f16, 32, 40, 0);
KVK_PREFILL(kvk::device::f16, 32, 40, 1);
KVK_PREFILL(kvk::device::f16, 32, 40, 2);
KVK_PREFILL(kvk::device::f16, 32, 40, 4);
KVK_PREFILL(kvk::device::f16, 32, 40, 8);
KVK_PREFILL(kvk::device::f16, 32, 40, 15);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 40>);

KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<2>);
KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<4>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_kernel<kvk::device::f16>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_kernel<float>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_backward_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_backward_kernel<kvk::device::f16>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_backward_kernel<float>);
KVK_EMULATED_KERNEL(kvk::device::check_table_kernel<512>);
KVK_EMULATED_KERNEL(kvk::device::check_slots_kernel<512>);
KVK_EMULATED_KERNEL(kvk::device::check_ids_kernel<512>);
