// The kernels of tests/test_cuda_ops_quant.py and tests/test_cuda_ops_hadamard.py.
#include "kvk/device/hadamard.cuh"
#include "kvk/device/quant.cuh"

#define KVK_HADAMARD(...) KVK_EMULATED_KERNEL(kvk::device::hadamard_kernel<kvk::device::HadamardConfig<__VA_ARGS__>>)
#define KVK_QUANT(...)                                                                      \
  KVK_EMULATED_KERNEL(kvk::device::quantize_kernel<kvk::device::QuantCoding<__VA_ARGS__>>); \
  KVK_EMULATED_KERNEL(kvk::device::dequantize_kernel<kvk::device::QuantCoding<__VA_ARGS__>>)

// In lanes; over shared memory in one and several passes; every order; in two parts.
KVK_HADAMARD(float, 1, false);
KVK_HADAMARD(float, 4, false);
KVK_HADAMARD(float, 128, false);
KVK_HADAMARD(kvk::device::bf16, 128, false);
KVK_HADAMARD(kvk::device::f16, 256, false);
KVK_HADAMARD(float, 2048, false);
KVK_HADAMARD(kvk::device::bf16, 8192, false);
KVK_HADAMARD(float, 96, false);
KVK_HADAMARD(float, 6144, false);
KVK_HADAMARD(float, 20, false);
KVK_HADAMARD(float, 20, true);
KVK_HADAMARD(kvk::device::bf16, 80, false);
KVK_HADAMARD(kvk::device::bf16, 80, true);
KVK_HADAMARD(kvk::device::f16, 112, false);
KVK_HADAMARD(kvk::device::f16, 112, true);
KVK_HADAMARD(kvk::device::bf16, 28672, false);
KVK_HADAMARD(float, 32768, false);

// Every width and axis; the formats of the golden files.
KVK_QUANT(float, 2, true, 0);
KVK_QUANT(float, 2, false, 0);
KVK_QUANT(float, 3, true, 0);
KVK_QUANT(float, 3, false, 0);
KVK_QUANT(float, 4, true, 0);
KVK_QUANT(float, 4, false, 0);
KVK_QUANT(float, 8, true, 0);
KVK_QUANT(float, 8, false, 0);
KVK_QUANT(float, 2, false, 32);
KVK_QUANT(float, 2, false, 64);
KVK_QUANT(float, 4, true, 80);
KVK_QUANT(kvk::device::bf16, 2, true, 0);
KVK_QUANT(kvk::device::bf16, 4, false, 0);
KVK_QUANT(kvk::device::bf16, 4, false, 96);
KVK_QUANT(kvk::device::f16, 3, true, 0);
KVK_QUANT(kvk::device::f16, 8, false, 0);
KVK_QUANT(kvk::device::f16, 8, true, 160);
