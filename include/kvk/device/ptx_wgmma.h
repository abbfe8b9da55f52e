// wgmma, sm_90a only: a warpgroup's asynchronous matrix product d[64 x N] += A[64 x 16] * B[16 x N], N = 64, 128, 192, 256.
//
//   wgmma_fence_operand(d); wgmma_fence(); wgmma<T, N>(d, a or desc_a, desc_b, accumulate) ...; wgmma_commit();
//   ... wgmma_wait<0>(); wgmma_fence_operand(d);
//
// Between the first wgmma and the wait nobody may touch d, a, or the operands' shared memory. Element d[i] of thread t:
// row (t / 32) * 16 + (t % 32) / 4 + (i / 2 % 2) * 8, column (i / 4) * 8 + (t % 4) * 2 + i % 2. A fragment in registers:
// the four words of mma.m16n8k16 for the 16 rows of the thread's warp.
#pragma once

#include "kvk/device/ptx_memory.h"

#if KVK_HAS_WGMMA

namespace kvk::device::ptx {

// How an operand lies in shared memory. All offsets are in bytes and multiples of 16.
enum class Swizzle : uint32_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };

// Descriptor of an operand tile. K-major (rows of k contiguous): stride = distance of 8-row groups, leading unused when
// swizzled. MN-major: leading = distance of the next swizzle span along m or n, stride = distance of 8 rows of k.
KVK_DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  return (uint64_t(smem_u32(tile) & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(swizzle) << 62;
}

KVK_DEVICE void wgmma_fence() {
#if KVK_EMULATOR
  emu::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
KVK_DEVICE void wgmma_commit(KVK_ONLY_LOC) {
#if KVK_EMULATOR
  emu::wgmma_commit(loc);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Keeps the compiler from moving uses of the accumulator past this place: it does not know that wgmma is asynchronous.
template <int kCount>
KVK_DEVICE void wgmma_fence_operand([[maybe_unused]] float (&d)[kCount]) {
#if !KVK_EMULATOR
  KVK_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
// Waits until at most kPending of the latest groups are still under way.
template <int kPending>
KVK_DEVICE void wgmma_wait(KVK_ONLY_LOC) {
#if KVK_EMULATOR
  emu::wgmma_wait(kPending, loc);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#if KVK_EMULATOR

template <class T, int N, bool kTransposeB = false>
inline void wgmma(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate KVK_LOC) {
  static_assert((kSameType<T, bf16> || kSameType<T, f16>) && N % 64 == 0 && N <= 256);
  emu::wgmma({d, N, kSameType<T, bf16>, accumulate, desc_a, desc_b, nullptr, kTransposeB}, loc);
}
template <class T, int N, bool kTransposeB = false>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate KVK_LOC) {
  static_assert((kSameType<T, bf16> || kSameType<T, f16>) && N % 64 == 0 && N <= 256);
  emu::wgmma({d, N, kSameType<T, bf16>, accumulate, 0, desc_b, a, kTransposeB}, loc);
}

#else

// The accumulator as asm operands, and their names in the instruction.
#define KVK_WGMMA_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define KVK_WGMMA_D16(i) KVK_WGMMA_D4(i), KVK_WGMMA_D4((i) + 4), KVK_WGMMA_D4((i) + 8), KVK_WGMMA_D4((i) + 12)
#define KVK_WGMMA_D32(i) KVK_WGMMA_D16(i), KVK_WGMMA_D16((i) + 16)
#define KVK_WGMMA_D64 KVK_WGMMA_D32(0)
#define KVK_WGMMA_D128 KVK_WGMMA_D64, KVK_WGMMA_D32(32)
#define KVK_WGMMA_D192 KVK_WGMMA_D128, KVK_WGMMA_D32(64)
#define KVK_WGMMA_D256 KVK_WGMMA_D192, KVK_WGMMA_D32(96)
#define KVK_WGMMA_NAMES64                                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26" \
  ",%27,%28,%29,%30,%31"
#define KVK_WGMMA_NAMES128                                                                           \
  KVK_WGMMA_NAMES64                                                                                  \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
  ",%56,%57,%58,%59,%60,%61,%62,%63"
#define KVK_WGMMA_NAMES192                                                                           \
  KVK_WGMMA_NAMES128                                                                                 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87" \
  ",%88,%89,%90,%91,%92,%93,%94,%95"
#define KVK_WGMMA_NAMES256                                                                           \
  KVK_WGMMA_NAMES192                                                                                 \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115" \
  ",%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// The asm statement for one N. The operands that follow the accumulator's N / 2 are named by number, since inline PTX has
// no named operands: (A,) descriptors, accumulate flag, transpose flag.
#define KVK_WGMMA_BEGIN(N, TYPE, ACCUMULATE)                                                                           \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
  " {" KVK_WGMMA_NAMES##N "}, "
#define KVK_WGMMA_SHARED_A(N, TYPE, DESC_A, DESC_B, ACCUMULATE, TRANSPOSE)                               \
  asm volatile(KVK_WGMMA_BEGIN(N, TYPE, ACCUMULATE) DESC_A ", " DESC_B ", p, 1, 1, 0, " TRANSPOSE ";\n}" \
               : KVK_WGMMA_D##N                                                                          \
               : "l"(desc_a), "l"(desc_b), "r"(int(accumulate)), "n"(int(kTransposeB)))
#define KVK_WGMMA_REGISTER_A(N, TYPE, A, DESC_B, ACCUMULATE, TRANSPOSE)                               \
  asm volatile(KVK_WGMMA_BEGIN(N, TYPE, ACCUMULATE) "{" A "}, " DESC_B ", p, 1, 1, " TRANSPOSE ";\n}" \
               : KVK_WGMMA_D##N                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(int(accumulate)), "n"(int(kTransposeB)))
#define KVK_WGMMA_EITHER_TYPE(FORM, N, ...) \
  if constexpr (kSameType<T, bf16>) {       \
    FORM(N, "bf16", __VA_ARGS__);           \
  } else {                                  \
    FORM(N, "f16", __VA_ARGS__);            \
  }

// d = (accumulate ? d : 0) + A * B. A and B lie in shared memory behind descriptors; B is K-major, or MN-major (as V is
// stored) with kTransposeB.
template <class T, int N, bool kTransposeB = false>
KVK_DEVICE void wgmma(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(kSameType<T, bf16> || kSameType<T, f16>);
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 64) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_SHARED_A, 64, "%32", "%33", "%34", "%35")
  } else if constexpr (N == 128) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_SHARED_A, 128, "%64", "%65", "%66", "%67")
  } else if constexpr (N == 192) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_SHARED_A, 192, "%96", "%97", "%98", "%99")
  } else if constexpr (N == 256) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_SHARED_A, 256, "%128", "%129", "%130", "%131")
  }
}

// As above with A, the warp's 16 rows of it, in registers.
template <class T, int N, bool kTransposeB = false>
KVK_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
  static_assert(kSameType<T, bf16> || kSameType<T, f16>);
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 64) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_REGISTER_A, 64, "%32, %33, %34, %35", "%36", "%37", "%38")
  } else if constexpr (N == 128) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_REGISTER_A, 128, "%64, %65, %66, %67", "%68", "%69", "%70")
  } else if constexpr (N == 192) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_REGISTER_A, 192, "%96, %97, %98, %99", "%100", "%101", "%102")
  } else if constexpr (N == 256) {
    KVK_WGMMA_EITHER_TYPE(KVK_WGMMA_REGISTER_A, 256, "%128, %129, %130, %131", "%132", "%133", "%134")
  }
}

#undef KVK_WGMMA_D4
#undef KVK_WGMMA_D16
#undef KVK_WGMMA_D32
#undef KVK_WGMMA_D64
#undef KVK_WGMMA_D128
#undef KVK_WGMMA_D192
#undef KVK_WGMMA_D256
#undef KVK_WGMMA_NAMES64
#undef KVK_WGMMA_NAMES128
#undef KVK_WGMMA_NAMES192
#undef KVK_WGMMA_NAMES256
#undef KVK_WGMMA_BEGIN
#undef KVK_WGMMA_SHARED_A
#undef KVK_WGMMA_REGISTER_A
#undef KVK_WGMMA_EITHER_TYPE

#endif

}  // namespace kvk::device::ptx

#endif  // KVK_HAS_WGMMA
