// The attention kernels of tests/test_cuda_ops_quant_attention.py: every width and axis of K and of V, rotated rows of a power
// of two and of another order, head dims off a multiple of 16; the options with one format.
#include "emulator/record_kernels.h"

// 2 and 2 bits, KIVI: bf16, D 64.
KVK_RECORD_DECODE(bf16, 64, 64, 1, 0, false, QuantPages<2, 32, true, false, 2, 32, false, false>);
KVK_RECORD_DECODE(bf16, 64, 64, 2, 0, false, QuantPages<2, 32, true, false, 2, 32, false, false>);
KVK_RECORD_PREFILL(bf16, 64, 64, 0, false, QuantPages<2, 32, true, false, 2, 32, false, false>);
// 3 bits along tokens for V, 8 bits along channels for K: f16, D 40, Dv 72, groups of 17 tokens.
KVK_RECORD_DECODE(f16, 40, 72, 2, 0, false, QuantPages<8, 40, false, false, 3, 17, true, false>);
KVK_RECORD_PREFILL(f16, 40, 72, 0, false, QuantPages<8, 40, false, false, 3, 17, true, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 72>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 72>);
// 4 and 8 bits, both rotated: bf16, D 80, Dv 64.
KVK_RECORD_DECODE(bf16, 80, 64, 2, 0, false, QuantPages<4, 16, false, true, 8, 16, true, true>);
KVK_RECORD_PREFILL(bf16, 80, 64, 0, false, QuantPages<4, 16, false, true, 8, 16, true, true>);
KVK_EMULATED_KERNEL(kvk::device::hadamard_kernel<kvk::device::HadamardConfig<kvk::device::bf16, 64, false>>);
// 3 and 4 bits with every option: f16, D 32, Dv 40.
KVK_RECORD_DECODE(f16, 32, 40, 1, 7, false, QuantPages<3, 24, true, false, 4, 40, false, false>);
KVK_RECORD_DECODE(f16, 32, 40, 2, 15, false, QuantPages<3, 24, true, false, 4, 40, false, false>);
KVK_RECORD_PREFILL(f16, 32, 40, 15, false, QuantPages<3, 24, true, false, 4, 40, false, false>);
// 8 and 2 bits, key bias alone: f16, D 32, Dv 40.
KVK_RECORD_DECODE(f16, 32, 40, 2, 4, false, QuantPages<8, 16, true, false, 2, 40, false, false>);
KVK_RECORD_PREFILL(f16, 32, 40, 4, false, QuantPages<8, 16, true, false, 2, 40, false, false>);
