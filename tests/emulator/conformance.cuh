// One small kernel for each ptx:: wrapper and CUDA built-in that kvk uses, on words in, words out. The emulator runs them in
// its tests (test_conformance.cc) and writes its answers down (conformance --json); a run on a card compares.
//
// `in` holds 4096 random words; `out` is filled with 0xffffffff before. The kernels make their operands from the words so
// that the answer is exact, but for the approximate functions, whose cases state a relative error.
#pragma once

#include "kvk/device/ptx.h"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

namespace kvk::device {

struct ConformanceParams {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* counter;  // one word, 0 before the launch
  TensorMap map;      // bf16 view of `in`, for the tensor copies
};

// X(kernel, threads, dynamic shared bytes, words of out, log2 of the allowed relative error or 0 when exact)
#define KVK_CONFORMANCE_CASES(X)              \
  X(conform_ex2, 128, 0, 512, -21)            \
  X(conform_lg2, 128, 0, 512, -20)            \
  X(conform_rcp, 128, 0, 512, -22)            \
  X(conform_rsqrt, 128, 0, 512, -21)          \
  X(conform_tanh_approx, 128, 0, 512, -10)    \
  X(conform_convert, 128, 0, 640, 0)          \
  X(conform_bytes, 128, 0, 640, 0)            \
  X(conform_memory, 128, 0, 1537, 0)          \
  X(conform_cp_async, 128, 8192, 2048, 0)     \
  X(conform_ldmatrix, 32, 1024, 448, 0)       \
  X(conform_mma_bf16, 32, 0, 128, 0)          \
  X(conform_mma_f16, 32, 0, 128, 0)           \
  X(conform_mma_s8, 32, 0, 128, 0)            \
  X(conform_named_barrier, 128, 1024, 128, 0) \
  X(conform_mbarrier, 128, 1024, 128, 0)      \
  X(conform_warp, 32, 0, 640, 0)              \
  X(conform_atomics, 128, 0, 16, 0)
#define KVK_CONFORMANCE_TMA_CASES(X)       \
  X(conform_bulk_load, 128, 8448, 2048, 0) \
  X(conform_tma_2d, 128, 9216, 2048, 0)    \
  X(conform_tma_3d, 128, 9216, 2048, 0)    \
  X(conform_tma_4d, 128, 9216, 2048, 0)
// X(kernel, type, N, B is MN-major)
#define KVK_CONFORMANCE_WGMMA_CASES(X) \
  X(conform_wgmma, bf16, 64, false)    \
  X(conform_wgmma, f16, 64, true)      \
  X(conform_wgmma, f16, 128, false)    \
  X(conform_wgmma, bf16, 128, true)    \
  X(conform_wgmma, bf16, 192, false)   \
  X(conform_wgmma, f16, 192, true)     \
  X(conform_wgmma, f16, 256, false)    \
  X(conform_wgmma, bf16, 256, true)

inline constexpr int kConformanceInWords = 4096;

// An exact small number from some bits of a word: -8 to 8.
KVK_DEVICE float small_number(uint32_t word, int shift) { return static_cast<float>(int((word >> shift) % 17) - 8); }

// Two elements of T from a word of input, each a small number.
template <class T>
KVK_DEVICE uint32_t small_pair(uint32_t word) {
  return pack2<T>(small_number(word, 0), small_number(word, 16));
}

#define KVK_CONFORM_FUNCTION(name, argument)                                       \
  KVK_KERNEL(128) conform_##name(const __grid_constant__ ConformanceParams p) {    \
    for (int i = threadIdx.x; i < 512; i += 128) {                                 \
      const float fraction = static_cast<float>(p.in[i] >> 8) * (1.0f / 16777216); \
      p.out[i] = __float_as_uint(ptx::name(argument));                             \
    }                                                                              \
  }
KVK_CONFORM_FUNCTION(ex2, fraction * 200.0f - 100.0f)
KVK_CONFORM_FUNCTION(lg2, fraction * 1000.0f + 2.0f)
KVK_CONFORM_FUNCTION(rcp, fraction * 1000.0f + 0.001f)
KVK_CONFORM_FUNCTION(rsqrt, fraction * 1000.0f + 0.001f)
KVK_CONFORM_FUNCTION(tanh_approx, fraction * 8.0f - 4.0f)
#undef KVK_CONFORM_FUNCTION

// Any bits at all, NaN and subnormals among them.
KVK_KERNEL(128) conform_convert(const __grid_constant__ ConformanceParams p) {
  const int i = threadIdx.x;
  const uint32_t a = p.in[i * 2], b = p.in[i * 2 + 1];
  p.out[i] = ptx::cvt_bf16x2(__uint_as_float(a), __uint_as_float(b));
  // Exponents around f16's range, which random bits rarely hit.
  const uint32_t c = (a & 0x807fffff) | ((96 + (a >> 23 & 63)) << 23);
  p.out[128 + i] = ptx::cvt_f16x2(__uint_as_float(c), __uint_as_float(b));
  p.out[256 + i] = ptx::cvt_bf16(__uint_as_float(a));
  p.out[384 + i] = ptx::cvt_f16(__uint_as_float(c));
  const float wide = ptx::cvt_f32_from_f16(uint16_t(b));
  p.out[512 + i] = is_nan(wide) ? 0x7fffffffu : __float_as_uint(wide);
}

KVK_KERNEL(128) conform_bytes(const __grid_constant__ ConformanceParams p) {
  const int i = threadIdx.x;
  const uint32_t a = p.in[i * 3], b = p.in[i * 3 + 1], c = p.in[i * 3 + 2];
  p.out[i] = ptx::prmt(a, b, c & 0x7777);
  p.out[128 + i] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c);
  p.out[256 + i] = ptx::lop3<0x1b>(a, b, c);
  p.out[384 + i] = uint32_t(__dp4a(int(a), int(b), int(c)));
  p.out[512 + i] = __byte_perm(a, b, c) ^ __brev(c) ^ uint32_t(__popc(a) + __clz(int(b)) + __ffs(int(c)));
}

KVK_KERNEL(128) conform_memory(const __grid_constant__ ConformanceParams p) {
  const int i = threadIdx.x;
  ptx::prefetch_l2(p.in + i);
  const uint4 once = ptx::ld_global_nc_16(p.in + i * 4);
  const Words<4> again = load_words_once(p.in + i * 4);
  store_words(p.out + i * 4, Words<4>{{once.x, again.w[1], once.z, again.w[3]}});
  store_words(p.out + 512 + i * 4, load_words<4>(p.in + 512 + i * 4));
  store_words(p.out + 1024 + i * 2, load_words<2>(p.in + 1024 + i * 2));
  store_words(p.out + 1280 + i, load_words<1>(p.in + 1280 + i));
  const uint32_t before = ptx::atom_add_acq_rel(p.counter, 1);
  p.out[1408 + i] = before < 128 ? 1 : 0;
  if (before == 127) p.out[1536] = before;
}

KVK_KERNEL(128) conform_cp_async(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint32_t* s = carve.take<uint32_t>(2048, 128);
  const int i = threadIdx.x;
  ptx::cp_async<16>(s + i * 4, p.in + i * 4);
  ptx::cp_async_commit();
  ptx::cp_async<16>(s + 512 + i * 4, p.in + 512 + i * 4, i % 3 != 0);  // zeros where the copy is not valid
  ptx::cp_async<8>(s + 1024 + i * 2, p.in + 1024 + i * 2);
  ptx::cp_async_commit();
  ptx::cp_async<8>(s + 1280 + i * 2, p.in + 1280 + i * 2, i % 2 == 0);
  ptx::cp_async<4>(s + 1536 + i, p.in + 1536 + i);
  ptx::cp_async<4>(s + 1664 + i, p.in + 1664 + i, i % 5 != 0);
  ptx::cp_async_commit();
  store_words(s + 1792 + i * 2, load_words<2>(p.in + i * 2));
  ptx::cp_async_wait<2>();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int j = i; j < 2048; j += 128) p.out[j] = s[j ^ 32];
}

KVK_KERNEL(32) conform_ldmatrix(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint16_t* s =
      carve.take<uint16_t>(16 * 24, 128);  // rows of 16 elements, 24 apart: 16-byte aligned, no two in one bank
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) store_words(s + i / 8 * 24 + i % 8 * 2, load_words<1>(p.in + i));
  __syncwarp();
  const uint16_t* row = s + (lane % 8 + lane / 8 % 2 * 8) * 24 + lane / 16 * 8;
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix(one, row);
  p.out[lane] = one[0];
  ptx::ldmatrix_trans(one, row);
  p.out[32 + lane] = one[0];
  ptx::ldmatrix(two, row);
  for (int i = 0; i < 2; ++i) p.out[64 + i * 32 + lane] = two[i];
  ptx::ldmatrix_trans(two, row);
  for (int i = 0; i < 2; ++i) p.out[128 + i * 32 + lane] = two[i];
  ptx::ldmatrix(four, row);
  for (int i = 0; i < 4; ++i) p.out[192 + i * 32 + lane] = four[i];
  ptx::ldmatrix_trans(four, row);
  for (int i = 0; i < 4; ++i) p.out[320 + i * 32 + lane] = four[i];
}

template <class T>
KVK_DEVICE void conform_mma(const ConformanceParams& p) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = small_pair<T>(p.in[lane * 4 + i]);
  for (int i = 0; i < 4; ++i) d[i] = small_number(p.in[256 + lane * 4 + i], 3);
  const uint32_t b0 = small_pair<T>(p.in[128 + lane * 2]), b1 = small_pair<T>(p.in[128 + lane * 2 + 1]);
  ptx::mma_m16n8k16<T>(d, a, b0, b1);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = __float_as_uint(d[i]);
}
KVK_KERNEL(32) conform_mma_bf16(const __grid_constant__ ConformanceParams p) { conform_mma<bf16>(p); }
KVK_KERNEL(32) conform_mma_f16(const __grid_constant__ ConformanceParams p) { conform_mma<f16>(p); }

KVK_KERNEL(32) conform_mma_s8(const __grid_constant__ ConformanceParams p) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  int32_t d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.in[lane * 4 + i];
  for (int i = 0; i < 4; ++i) d[i] = int(p.in[256 + lane * 4 + i] >> 8);
  ptx::mma_m16n8k32_s8(d, a, p.in[128 + lane * 2], p.in[128 + lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = uint32_t(d[i]);
}

// Warps 0 and 1 hand words to warps 2 and 3, and get the sums back.
KVK_KERNEL(128) conform_named_barrier(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint32_t* s = carve.take<uint32_t>(128);
  const int i = threadIdx.x;
  if (i < 64) {
    s[i] = p.in[i];
    ptx::bar_arrive(1, 128);
    ptx::bar_sync(2, 128);
    p.out[i] = s[64 + (i ^ 1)];
  } else {
    ptx::bar_sync(1, 128);
    s[i] = s[i - 64] + p.in[i];
    ptx::bar_arrive(2, 128);
    p.out[i] = s[(i - 64) ^ 33];
  }
}

// Three phases: warp 0 writes, the others read, and say when they have.
KVK_KERNEL(128) conform_mbarrier(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint32_t* s = carve.take<uint32_t>(32);
  uint64_t* full = carve.take<uint64_t>(1);
  uint64_t* empty = carve.take<uint64_t>(1);
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::mbar_init(full, 32);
    ptx::mbar_init(empty, 96);
  }
  __syncthreads();
  uint32_t sum = 0;
  for (uint32_t phase = 0; phase < 3; ++phase) {
    if (i < 32) {
      ptx::mbar_wait(empty, (phase & 1) ^ 1);
      s[i] = p.in[phase * 32 + i];
      ptx::mbar_arrive(full);
    } else {
      ptx::mbar_wait(full, phase & 1);
      sum = sum * 3 + s[(i + phase) % 32];
      ptx::mbar_arrive(empty);
    }
  }
  p.out[i] = sum;
}

KVK_KERNEL(32) conform_warp(const __grid_constant__ ConformanceParams p) {
  const uint32_t full = 0xffffffffu;
  const int lane = threadIdx.x;
  const uint32_t v = p.in[lane];
  uint32_t* out = p.out + lane;
  out[0] = __shfl_sync(full, v, 5);
  out[32] = __shfl_sync(full, v, lane * 7, 8);
  out[64] = __shfl_xor_sync(full, v, 9);
  out[96] = __shfl_xor_sync(full, v, 16, 8);
  out[128] = __shfl_down_sync(full, v, 3);
  out[160] = __shfl_down_sync(full, v, 3, 8);
  out[192] = __shfl_up_sync(full, v, 2);
  out[224] = __shfl_up_sync(full, v, 2, 16);
  out[256] = __float_as_uint(__shfl_xor_sync(full, __uint_as_float(v & 0x3fffffff), 1));
  const int64_t wide = __shfl_sync(full, int64_t(v) << 20, 31 - lane);
  out[288] = uint32_t(wide) ^ uint32_t(wide >> 32);
  out[320] = __ballot_sync(full, v & 1);
  out[352] = uint32_t(__any_sync(full, v == p.in[3])) + 2 * uint32_t(__all_sync(full, v != 0));
  out[384] = lane < 16 ? __ballot_sync(0x0000ffffu, lane & 1) : __ballot_sync(0xffff0000u, v & 1);
  out[416] = __reduce_add_sync(full, v);
  out[448] = uint32_t(__reduce_min_sync(full, int(v)));
  out[480] = __reduce_max_sync(full, v);
  out[512] = __reduce_and_sync(full, v | 0xff) ^ __reduce_or_sync(full, v & 0xff00);
  out[544] = __reduce_xor_sync(full, v);
  out[576] = __match_any_sync(full, v & 3);
  out[608] = uint32_t(__reduce_max_sync(full, int(v))) + uint32_t(__reduce_add_sync(full, int(v) >> 4));
}

KVK_KERNEL(128) conform_atomics(const __grid_constant__ ConformanceParams p) {
  const int i = threadIdx.x;
  if (i < 16) p.out[i] = i == 3 || i == 5 ? 0xffffffffu : 0;
  __syncthreads();
  const uint32_t v = p.in[i];
  atomicAdd(p.out + 0, v);
  atomicAdd(reinterpret_cast<int*>(p.out + 1), int(v));
  atomicMax(p.out + 2, v);
  atomicMin(p.out + 3, v);
  atomicMax(reinterpret_cast<int*>(p.out + 4), int(v));
  atomicAnd(p.out + 5, v | 0x0f0f0f0f);
  atomicOr(p.out + 6, v & 0x00ff00ff);
  atomicXor(p.out + 7, v);
  atomicAdd(reinterpret_cast<float*>(p.out + 8), static_cast<float>(int(v % 1024)));
  atomicInc(p.out + 9, 99);
  if (i == 17) atomicExch(p.out + 10, v);
  if (i == 18) atomicCAS(p.out + 11, 0u, v);
  atomicMin(reinterpret_cast<int*>(p.out + 12), int(v));
  atomicSub(p.out + 13, v);
}

#if KVK_HAS_TMA

KVK_KERNEL(128) conform_bulk_load(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint32_t* s = carve.take<uint32_t>(2048, 128);
  uint64_t* bar = carve.take<uint64_t>(1);
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_init_fence();
  }
  __syncthreads();
  if (i == 0) {
    ptx::mbar_arrive_expect_tx(bar, 8192);
    ptx::bulk_load(s, p.in + 4, 48, bar);
    ptx::bulk_load(s + 12, p.in + 16, 8144, bar);
  }
  ptx::mbar_wait(bar, 0);
  for (int j = i; j < 2048; j += 128) p.out[j] = s[j];
}

// A tile of 8 KiB at `x` .. of the map; the raw bytes of shared memory show the swizzle.
template <class Copy>
KVK_DEVICE void conform_tma(const ConformanceParams& p, Copy copy) {
  SmemCarver carve;
  uint32_t* s = carve.take<uint32_t>(2048, 1024);
  uint64_t* bar = carve.take<uint64_t>(1);
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::prefetch_tensor_map(&p.map);
    ptx::mbar_init(bar, 1);
    ptx::mbar_init_fence();
  }
  __syncthreads();
  if (i == 0) {
    ptx::mbar_arrive_expect_tx(bar, 8192);
    copy(&p.map, s, bar);
  }
  ptx::mbar_wait(bar, 0);
  for (int j = i; j < 2048; j += 128) p.out[j] = s[j];
}
// The maps (test_conformance.cc): 2d [64, 128] boxes of [64, 64], 128-byte swizzle; 3d [4, 32, 64], boxes [2, 32, 64]
// without; 4d [2, 4, 16, 64], boxes [1, 4, 32, 32], 64-byte swizzle. Each copy hangs over the tensor's edge.
KVK_KERNEL(128) conform_tma_2d(const __grid_constant__ ConformanceParams p) {
  conform_tma(p, [](const TensorMap* map, uint32_t* s, uint64_t* bar) { ptx::tma_load_2d(s, map, bar, 96, -3); });
}
KVK_KERNEL(128) conform_tma_3d(const __grid_constant__ ConformanceParams p) {
  conform_tma(p, [](const TensorMap* map, uint32_t* s, uint64_t* bar) { ptx::tma_load_3d(s, map, bar, 8, 5, 3); });
}
KVK_KERNEL(128) conform_tma_4d(const __grid_constant__ ConformanceParams p) {
  conform_tma(p, [](const TensorMap* map, uint32_t* s, uint64_t* bar) { ptx::tma_load_4d(s, map, bar, 32, 2, 1, 1); });
}

#endif  // KVK_HAS_TMA

#if KVK_HAS_WGMMA

// Both forms of one product [64 x 16] * [16 x N]: out holds the N / 2 accumulators of each thread for A in shared memory,
// then for A in registers. Operands are small integers, so the result is exact.
template <class T, int N, bool kTransposeB>
KVK_KERNEL(128)
conform_wgmma(const __grid_constant__ ConformanceParams p) {
  SmemCarver carve;
  uint32_t* a = carve.take<uint32_t>(64 * 8, 1024);  // [8-row group][16-byte column block of k][8 rows][16 bytes]
  uint32_t* b = carve.take<uint32_t>(N * 8, 1024);
  const int tid = threadIdx.x;
  for (int i = tid; i < 64 * 8; i += 128) a[i] = small_pair<T>(p.in[i]);
  for (int i = tid; i < N * 8; i += 128) b[i] = small_pair<T>(p.in[512 + i]);
  ptx::fence_proxy_async();
  __syncthreads();
  // No swizzle: 8 x 8 blocks of 128 bytes. K-major: blocks along k 128 apart, groups of 8 rows 256. MN-major: the two
  // offsets change places in meaning.
  const uint64_t desc_a = ptx::wgmma_descriptor(a, 128, 256, ptx::Swizzle::none);
  const uint64_t desc_b = kTransposeB ? ptx::wgmma_descriptor(b, 128 * (N / 8), 128, ptx::Swizzle::none)
                                      : ptx::wgmma_descriptor(b, 128, 256, ptx::Swizzle::none);
  float shared_a[N / 2];
  KVK_UNROLL
  for (int i = 0; i < N / 2; ++i) shared_a[i] = small_number(p.in[i], 5);
  ptx::wgmma_fence_operand(shared_a);
  ptx::wgmma_fence();
  ptx::wgmma<T, N, kTransposeB>(shared_a, desc_a, desc_b, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_operand(shared_a);
  KVK_UNROLL
  for (int i = 0; i < N / 2; ++i) p.out[tid * N + i] = __float_as_uint(shared_a[i]);
  uint32_t words[4];
  const int row = tid / 32 * 16 + tid % 32 / 4;
  KVK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int r = row + i % 2 * 8, block = i / 2;
    words[i] = a[r / 8 * 64 + block * 32 + r % 8 * 4 + tid % 4];
  }
  float register_a[N / 2] = {};
  ptx::wgmma_fence_operand(register_a);
  ptx::wgmma_fence();
  ptx::wgmma<T, N, kTransposeB>(register_a, words, desc_b, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_operand(register_a);
  KVK_UNROLL
  for (int i = 0; i < N / 2; ++i) p.out[tid * N + N / 2 + i] = __float_as_uint(register_a[i]);
}

#endif  // KVK_HAS_WGMMA

}  // namespace kvk::device
