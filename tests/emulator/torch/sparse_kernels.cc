// The kernels of tests/test_cuda_ops_sparse.py: every way to select, rows of one lane's 8 channels up to a whole warp's, f32 and
// rotated rows.
#include "kvk/device/check_values.cuh"
#include "kvk/device/sparse.cuh"

#define KVK_COMPRESS(...) KVK_EMULATED_KERNEL(kvk::device::compress_kernel<kvk::device::SparseCoding<__VA_ARGS__>>)
#define KVK_SELECT(in, value, dim, rotated, select) \
  KVK_COMPRESS(in, kvk::device::value, dim, rotated, kvk::device::Select::select)
#define KVK_DECOMPRESS(value, dim, rotated) \
  KVK_EMULATED_KERNEL(kvk::device::decompress_kernel<kvk::device::value, dim, rotated>)

KVK_SELECT(kvk::device::bf16, bf16, 32, false, magnitude);
KVK_SELECT(kvk::device::bf16, bf16, 32, false, scores);
KVK_SELECT(kvk::device::bf16, bf16, 32, false, mask);
KVK_SELECT(kvk::device::bf16, bf16, 32, false, bitmap);
KVK_SELECT(kvk::device::f16, f16, 72, false, magnitude);
KVK_SELECT(kvk::device::f16, f16, 72, false, scores);
KVK_SELECT(kvk::device::bf16, bf16, 128, false, magnitude);
KVK_SELECT(kvk::device::bf16, bf16, 256, false, magnitude);
KVK_SELECT(kvk::device::bf16, bf16, 256, false, scores);
// The formats of the golden files.
KVK_SELECT(float, bf16, 64, false, magnitude);
KVK_SELECT(float, f16, 128, false, magnitude);
KVK_SELECT(float, bf16, 40, false, magnitude);
KVK_SELECT(float, bf16, 72, false, magnitude);
KVK_SELECT(float, bf16, 80, true, magnitude);
KVK_SELECT(float, bf16, 160, true, magnitude);
KVK_SELECT(kvk::device::bf16, bf16, 80, true, magnitude);
KVK_DECOMPRESS(bf16, 32, false);
KVK_DECOMPRESS(f16, 72, false);
KVK_DECOMPRESS(bf16, 128, false);
KVK_DECOMPRESS(bf16, 256, false);
KVK_DECOMPRESS(bf16, 64, false);
KVK_DECOMPRESS(f16, 128, false);
KVK_DECOMPRESS(bf16, 40, false);
KVK_DECOMPRESS(bf16, 72, false);
KVK_DECOMPRESS(bf16, 80, true);
KVK_DECOMPRESS(bf16, 160, true);
// KVK_CHECK=1.
KVK_EMULATED_KERNEL(kvk::device::check_select_kernel<512>);
