// The instantiations of the paged kernels that test_paged.cc launches by name.
#include "emulator/paged_kernels.h"

KVK_DECODE(kvk::device::bf16, 128, 128, 1, 0);
KVK_DECODE(kvk::device::f16, 64, 40, 1, 7);
KVK_DECODE(kvk::device::bf16, 72, 96, 2, 0);
KVK_DECODE(kvk::device::f16, 32, 32, 2, 0);
KVK_DECODE(kvk::device::bf16, 64, 64, 2, 0);
KVK_DECODE(kvk::device::f16, 32, 48, 2, 15);
KVK_DECODE(kvk::device::bf16, 160, 160, 2, 0);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 128>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 40>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 96>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 32>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 64>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 48>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 160>);

KVK_PREFILL(kvk::device::bf16, 64, 64, 0);
KVK_PREFILL(kvk::device::f16, 32, 48, 15);
KVK_PREFILL(kvk::device::bf16, 160, 160, 0);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 64>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 48>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 160>);

// For cards with little shared memory a block.
KVK_DECODE(kvk::device::bf16, 256, 256, 1, 0, true);
KVK_DECODE(kvk::device::bf16, 256, 256, 2, 0, true);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 256>);
KVK_PREFILL(kvk::device::bf16, 256, 256, 0, true);
KVK_PREFILL(kvk::device::bf16, 128, 128, 0, true);
KVK_DECODE(kvk::device::bf16, 128, 128, 2, 0, true);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 256>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 128>);
