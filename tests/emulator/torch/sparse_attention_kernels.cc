// The attention kernels of tests/test_cuda_ops_sparse_attention.py: rows of bitmaps of whole chunks and off them, everything kept,
// rotated rows, head dims off a multiple of 16; the options with one format.
#include "emulator/record_kernels.h"

// 50% of K, 75% of V pruned: bf16, D 64.
KVK_RECORD_DECODE(bf16, 64, 64, 1, 0, false, BitmapPages<32, false, 16, false>);
KVK_RECORD_DECODE(bf16, 64, 64, 2, 0, false, BitmapPages<32, false, 16, false>);
KVK_RECORD_PREFILL(bf16, 64, 64, 0, false, BitmapPages<32, false, 16, false>);
// Bitmaps of 5 and 9 bytes a row: f16, D 40, Dv 72.
KVK_RECORD_DECODE(f16, 40, 72, 2, 0, false, BitmapPages<40, false, 24, false>);
KVK_RECORD_PREFILL(f16, 40, 72, 0, false, BitmapPages<40, false, 24, false>);
// Both rotated: bf16, D 80, Dv 64.
KVK_RECORD_DECODE(bf16, 80, 64, 2, 0, false, BitmapPages<40, true, 24, true>);
KVK_RECORD_PREFILL(bf16, 80, 64, 0, false, BitmapPages<40, true, 24, true>);
// Every option: f16, D 32, Dv 40.
KVK_RECORD_DECODE(f16, 32, 40, 1, 7, false, BitmapPages<16, false, 24, false>);
KVK_RECORD_DECODE(f16, 32, 40, 2, 15, false, BitmapPages<16, false, 24, false>);
KVK_RECORD_PREFILL(f16, 32, 40, 15, false, BitmapPages<16, false, 24, false>);
// Key bias alone: f16, D 32, Dv 40.
KVK_RECORD_DECODE(f16, 32, 40, 2, 4, false, BitmapPages<8, false, 40, false>);
KVK_RECORD_PREFILL(f16, 32, 40, 4, false, BitmapPages<8, false, 40, false>);
