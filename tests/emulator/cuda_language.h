// The words of CUDA C++ that kvk's kernels use, as plain C++. include/kvk/device/lang.h includes this file when a host
// compiler reads device code; nothing else should.
#pragma once

#ifdef __CUDACC__
#error "this is the host's stand-in for CUDA; NVRTC and nvcc must not see it"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulator/instructions.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

using dim3 = kvk::emu::Dim3;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (::kvk::emu::thread_index())
#define blockIdx (::kvk::emu::block_index())
#define blockDim (::kvk::emu::block_dim())
#define gridDim (::kvk::emu::grid_dim())
inline constexpr int warpSize = 32;

#define KVK_EMU_LOC ::kvk::emu::Loc loc = ::kvk::emu::Loc::current()

// ---------------------------------------------------------------------------------------------- barriers and fences
inline void __syncthreads(KVK_EMU_LOC) { kvk::emu::barrier(0, 0, true, loc); }
inline int __syncthreads_or(int p, KVK_EMU_LOC) { return kvk::emu::barrier(0, 0, true, loc, p != 0) != 0; }
inline int __syncthreads_and(int p, KVK_EMU_LOC) { return kvk::emu::barrier(0, 0, true, loc, p == 0) == 0; }
inline int __syncthreads_count(int p, KVK_EMU_LOC) { return kvk::emu::barrier(0, 0, true, loc, p != 0); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, KVK_EMU_LOC) { kvk::emu::syncwarp(mask, loc); }
inline void __threadfence() { kvk::emu::thread_fence(true); }
inline void __threadfence_block() { kvk::emu::thread_fence(false); }
[[noreturn]] inline void __trap() { KVK_EMU_FAIL("trap", "the kernel executed __trap()"); }

// ---------------------------------------------------------------------------------------------- warp collectives
namespace kvk::emu {
template <class T>
T shuffle_value(Collective kind, uint32_t mask, T value, int source, Loc loc) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "shuffles move 32- or 64-bit numbers");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, source, loc);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace kvk::emu

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, KVK_EMU_LOC) {
  const int lane = int(kvk::emu::lane_index());
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return kvk::emu::shuffle_value(kvk::emu::Collective::shfl, mask, value, from, loc);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, KVK_EMU_LOC) {
  const int lane = int(kvk::emu::lane_index());
  const int from = lane ^ lane_mask;
  const int last = lane | (width - 1);
  return kvk::emu::shuffle_value(kvk::emu::Collective::shfl_xor, mask, value, from <= last ? from : lane, loc);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, KVK_EMU_LOC) {
  const int lane = int(kvk::emu::lane_index());
  const bool inside = (lane & (width - 1)) + int(delta) < width;
  return kvk::emu::shuffle_value(kvk::emu::Collective::shfl_down, mask, value, inside ? lane + int(delta) : lane, loc);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, KVK_EMU_LOC) {
  const int lane = int(kvk::emu::lane_index());
  const bool inside = (lane & (width - 1)) >= int(delta);
  return kvk::emu::shuffle_value(kvk::emu::Collective::shfl_up, mask, value, inside ? lane - int(delta) : lane, loc);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, KVK_EMU_LOC) {
  return kvk::emu::vote(kvk::emu::Collective::ballot, mask, p != 0, loc);
}
inline int __any_sync(uint32_t mask, int p, KVK_EMU_LOC) {
  return kvk::emu::vote(kvk::emu::Collective::any, mask, p != 0, loc) != 0;
}
inline int __all_sync(uint32_t mask, int p, KVK_EMU_LOC) {
  return kvk::emu::vote(kvk::emu::Collective::all, mask, p == 0, loc) == 0;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, KVK_EMU_LOC) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return kvk::emu::match_any(mask, bits, loc);
}
#define KVK_EMU_REDUCE(name)                                                                         \
  inline unsigned __reduce_##name##_sync(uint32_t mask, unsigned v, KVK_EMU_LOC) {                   \
    return kvk::emu::reduce(kvk::emu::Collective::reduce_##name, mask, v, false, loc);               \
  }                                                                                                  \
  inline int __reduce_##name##_sync(uint32_t mask, int v, KVK_EMU_LOC) {                             \
    return int(kvk::emu::reduce(kvk::emu::Collective::reduce_##name, mask, uint32_t(v), true, loc)); \
  }
KVK_EMU_REDUCE(add)
KVK_EMU_REDUCE(min)
KVK_EMU_REDUCE(max)
#undef KVK_EMU_REDUCE
inline unsigned __reduce_and_sync(uint32_t mask, unsigned v, KVK_EMU_LOC) {
  return kvk::emu::reduce(kvk::emu::Collective::reduce_and, mask, v, false, loc);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned v, KVK_EMU_LOC) {
  return kvk::emu::reduce(kvk::emu::Collective::reduce_or, mask, v, false, loc);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned v, KVK_EMU_LOC) {
  return kvk::emu::reduce(kvk::emu::Collective::reduce_xor, mask, v, false, loc);
}

// ---------------------------------------------------------------------------------------------- bits and numbers
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t{hi} << 32 | lo) >> (shift < 32 ? shift : 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s, KVK_EMU_LOC) {
  return kvk::emu::prmt(x, y, s & 0x7777, loc);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
  return c;
}
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------- memory
template <class T>
T __ldg(const T* p, KVK_EMU_LOC) {
  T v;
  kvk::emu::read_const(&v, p, sizeof(T), loc);
  return v;
}

namespace kvk::emu {
// The emulator runs one fiber at a time, so a read-modify-write is a plain one that is announced as atomic.
template <class T, class Update>
T atomic_update(T* p, Update update, Loc loc) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  atomic_access(p, sizeof(T), loc);
  T old;
  copy_unchecked(&old, p, sizeof(T));
  const T now = update(old);
  copy_unchecked(p, &now, sizeof(T));
  return old;
}
}  // namespace kvk::emu

#define KVK_EMU_ATOMIC(name, T, expression)                                         \
  inline T name(T* p, T v, KVK_EMU_LOC) {                                           \
    return kvk::emu::atomic_update(p, [v](T old) -> T { return expression; }, loc); \
  }
KVK_EMU_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(v)))
KVK_EMU_ATOMIC(atomicAdd, unsigned, old + v)
KVK_EMU_ATOMIC(atomicAdd, unsigned long long, old + v)
KVK_EMU_ATOMIC(atomicAdd, float, old + v)
KVK_EMU_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(v)))
KVK_EMU_ATOMIC(atomicSub, unsigned, old - v)
KVK_EMU_ATOMIC(atomicMax, int, old > v ? old : v)
KVK_EMU_ATOMIC(atomicMax, unsigned, old > v ? old : v)
KVK_EMU_ATOMIC(atomicMin, int, old < v ? old : v)
KVK_EMU_ATOMIC(atomicMin, unsigned, old < v ? old : v)
KVK_EMU_ATOMIC(atomicAnd, unsigned, old& v)
KVK_EMU_ATOMIC(atomicOr, unsigned, old | v)
KVK_EMU_ATOMIC(atomicXor, unsigned, old ^ v)
KVK_EMU_ATOMIC(atomicExch, int, (void(old), v))
KVK_EMU_ATOMIC(atomicExch, unsigned, (void(old), v))
KVK_EMU_ATOMIC(atomicExch, float, (void(old), v))
KVK_EMU_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
#undef KVK_EMU_ATOMIC
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v, KVK_EMU_LOC) {
  return kvk::emu::atomic_update(p, [=](unsigned old) { return old == expected ? v : old; }, loc);
}
inline int atomicCAS(int* p, int expected, int v, KVK_EMU_LOC) {
  return kvk::emu::atomic_update(p, [=](int old) { return old == expected ? v : old; }, loc);
}
