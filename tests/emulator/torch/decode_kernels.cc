// The decode kernels of tests/test_emulated_ops.py: two head dims; few query heads (one half tile of rows) and many.
#include "emulator/paged_kernels.h"

KVK_DECODE(kvk::device::bf16, 64, 64, 1, 0);
KVK_DECODE(kvk::device::bf16, 64, 64, 2, 0);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 64>);

// f16, D 32, Dv 40: soft cap 1, ALiBi 2, key bias 4, tree mask 8.
KVK_DECODE(kvk::device::f16, 32, 40, 1, 0);
KVK_DECODE(kvk::device::f16, 32, 40, 1, 1);
KVK_DECODE(kvk::device::f16, 32, 40, 1, 2);
KVK_DECODE(kvk::device::f16, 32, 40, 1, 4);
KVK_DECODE(kvk::device::f16, 32, 40, 1, 7);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 0);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 1);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 2);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 4);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 8);
KVK_DECODE(kvk::device::f16, 32, 40, 2, 15);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 40>);
