// Small Hopper products for the emulator's tests and its mutation test: not the library's kernels.
#pragma once

#include "kvk/device/ptx.h"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

#if KVK_HAS_WGMMA

namespace kvk::device {

// out[t] of thread t: where element i of a 64 x N accumulator belongs.
KVK_DEVICE int wgmma_row(int tid, int i) { return tid % 128 / 32 * 16 + tid % 32 / 4 + i / 2 % 2 * 8; }
KVK_DEVICE int wgmma_column(int tid, int i) { return i / 4 * 8 + tid % 4 * 2 + i % 2; }

struct ToyGemmParams {
  TensorMap a, b;  // bf16 [64, k], [128, k]: boxes of 64 columns, all rows, 128-byte swizzle
  float* out;      // [64, 128] = a * b^T
  int32_t k;
  int32_t defect;  // 0: none
};

struct ToyGemmConfig {
  static constexpr int kTile = 64, kStages = 2, kThreads = 256;
  static constexpr size_t kSmemBytes = SmemBytes()
                                           .add<bf16>(kStages * 64 * kTile, 1024)
                                           .add<bf16>(kStages * 128 * kTile, 1024)
                                           .add<uint64_t>(kStages)
                                           .add<uint64_t>(kStages)
                                           .total;
};

// Warpgroup 0 multiplies, warpgroup 1 fetches tiles through TMA.
template <class Config>
KVK_KERNEL(Config::kThreads, 1)
toy_gemm_kernel(const __grid_constant__ ToyGemmParams p) {
  constexpr int kTile = Config::kTile, kStages = Config::kStages;
  SmemCarver carve;
  bf16* smem_a = carve.take<bf16>(kStages * 64 * kTile, 1024);
  bf16* smem_b = carve.take<bf16>(kStages * 128 * kTile, 1024);
  uint64_t* full = carve.take<uint64_t>(kStages);
  uint64_t* empty = carve.take<uint64_t>(kStages);
  const int tid = threadIdx.x, tiles = p.k / kTile;
  const int defect = p.defect;
  if (tid == 0) {
    for (int s = 0; s < kStages; s++) {
      ptx::mbar_init(full + s, 1);
      ptx::mbar_init(empty + s, 128);
    }
    ptx::mbar_init_fence();
  }
  if (defect != 47) __syncthreads();  // 47: no barrier after the mbarriers' initialisation
  if (tid >= 128) {
    ptx::set_max_registers_down<40>();
    for (int i = 0; i < tiles && tid == 128; i++) {
      const int s = i % kStages, phase = i / kStages & 1;
      ptx::mbar_wait(empty + s, defect == 42 ? phase : phase ^ 1);  // 42: wrong parity
      const int columns = defect == 43 ? 64 : 128;                  // 43: wrong byte count
      ptx::mbar_arrive_expect_tx(full + s, (64 + columns) * kTile * 2);
      ptx::tma_load_2d(smem_a + s * 64 * kTile, &p.a, full + s, i * kTile, 0);
      ptx::tma_load_2d(smem_b + s * 128 * kTile, &p.b, full + s, i * kTile, 0);
    }
    return;
  }
  ptx::set_max_registers_up<232>();
  float d[64] = {};
  for (int i = 0; i < tiles; i++) {
    const int s = i % kStages, phase = i / kStages & 1;
    if (defect != 48) ptx::mbar_wait(full + s, phase);  // 48: no wait for the tile
    if (defect == 45) ptx::mbar_arrive(empty + s);      // 45: released before it is read
    ptx::wgmma_fence_operand(d);
    if (defect != 41) ptx::wgmma_fence();               // 41: no fence
    const uint32_t stride = defect == 46 ? 512 : 1024;  // 46: wrong distance of 8-row groups
    const uint64_t desc_a = ptx::wgmma_descriptor(smem_a + s * 64 * kTile, 16, stride, ptx::Swizzle::b128);
    const uint64_t desc_b = ptx::wgmma_descriptor(smem_b + s * 128 * kTile, 16, stride, ptx::Swizzle::b128);
    KVK_UNROLL
    for (int k = 0; k < kTile / 16; k++) ptx::wgmma<bf16, 128>(d, desc_a + k * 2, desc_b + k * 2, true);
    ptx::wgmma_commit();
    if (defect != 40 || i + 1 < tiles) ptx::wgmma_wait<0>();  // 40: the last group is never waited for
    ptx::wgmma_fence_operand(d);
    if (defect != 45) ptx::mbar_arrive(empty + s);
  }
  KVK_UNROLL
  for (int i = 0; i < 64; i++) p.out[wgmma_row(tid, i) * 128 + wgmma_column(tid, i)] = d[i];
}

struct ToyStoreParams {
  const bf16* a;  // [64, 64]
  const bf16* b;  // [128, 64], or [64, 128] for toy_pv_kernel
  float* out;     // [64, 128]
  int32_t defect;
};

// Operands come from ordinary stores, as from a producer that decodes them: wgmma needs the proxy fence.
template <class T>
KVK_KERNEL(128)
toy_store_gemm_kernel(const __grid_constant__ ToyStoreParams p) {
  SmemCarver carve;
  bf16* smem_a = carve.take<bf16>(64 * 64, 1024);
  bf16* smem_b = carve.take<bf16>(128 * 64, 1024);
  const int tid = threadIdx.x;
  for (int i = tid; i < (64 + 128) * 8; i += 128) {
    const int row = i / 8, chunk = i % 8;
    const bf16* from = row < 64 ? p.a + row * 64 : p.b + (row - 64) * 64;
    bf16* to = row < 64 ? smem_a + row * 64 : smem_b + (row - 64) * 64;
    store_words(to + ((chunk ^ (row & 7)) << 3), load_words<4>(from + chunk * 8));
  }
  if (p.defect != 49) ptx::fence_proxy_async();  // 49: no fence between the stores and wgmma
  __syncthreads();
  float d[64] = {};
  ptx::wgmma_fence_operand(d);
  ptx::wgmma_fence();
  const uint64_t desc_a = ptx::wgmma_descriptor(smem_a, 16, 1024, ptx::Swizzle::b128);
  const uint64_t desc_b = ptx::wgmma_descriptor(smem_b, 16, 1024, ptx::Swizzle::b128);
  KVK_UNROLL
  for (int k = 0; k < 4; k++) ptx::wgmma<T, 128>(d, desc_a + k * 2, desc_b + k * 2, k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_operand(d);
  KVK_UNROLL
  for (int i = 0; i < 64; i++) p.out[wgmma_row(tid, i) * 128 + wgmma_column(tid, i)] = d[i];
}

// P * V as attention does it: P [64, 64] in registers, V [64 tokens, 128 dims] as stored, so MN-major.
template <class T>
KVK_KERNEL(128)
toy_pv_kernel(const __grid_constant__ ToyStoreParams p) {
  SmemCarver carve;
  bf16* smem_v = carve.take<bf16>(64 * 128, 1024);  // two blocks of 64 columns, each [64 tokens][128 bytes], swizzled
  const int tid = threadIdx.x;
  for (int i = tid; i < 64 * 16; i += 128) {
    const int row = i / 16, chunk = i % 16;
    store_words(smem_v + chunk / 8 * 64 * 64 + row * 64 + ((chunk % 8 ^ (row & 7)) << 3),
                load_words<4>(p.b + row * 128 + chunk * 8));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  uint32_t a[4][4];
  KVK_UNROLL
  for (int k = 0; k < 4; k++) {
    KVK_UNROLL
    for (int i = 0; i < 4; i++) {
      const int row = wgmma_row(tid, i * 2), column = k * 16 + i / 2 * 8 + tid % 4 * 2;
      a[k][i] = load_words<1>(p.a + row * 64 + column).w[0];
    }
  }
  float d[64] = {};
  ptx::wgmma_fence_operand(d);
  ptx::wgmma_fence();
  const uint64_t desc = ptx::wgmma_descriptor(smem_v, 64 * 128, 1024, ptx::Swizzle::b128);
  KVK_UNROLL
  for (int k = 0; k < 4; k++) ptx::wgmma<T, 128, true>(d, a[k], desc + k * (2048 >> 4), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_operand(d);
  KVK_UNROLL
  for (int i = 0; i < 64; i++) p.out[wgmma_row(tid, i) * 128 + wgmma_column(tid, i)] = d[i];
}

}  // namespace kvk::device

#endif  // KVK_HAS_WGMMA
