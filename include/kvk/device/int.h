// What a kernel's parameter struct and configuration are made of: fixed-width integers, 16-bit float storage, and
// KVK_HOST_DEVICE. Four compilers read it: NVRTC (which has no standard headers), nvcc, the host compiler of the launch
// code, and the host compiler of the emulator. It needs nothing from CUDA and nothing from the emulator.
#pragma once

#if defined(__CUDACC_RTC__)
namespace kvk::device {
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using size_t = decltype(sizeof(0));
using ptrdiff_t = long;
using uintptr_t = unsigned long;
}  // namespace kvk::device
#else
#include <cstddef>
#include <cstdint>
#endif

// For constexpr functions that the launch code and the kernels share (tile sizes, shared-memory bytes).
#if defined(__CUDACC__)
#define KVK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVK_HOST_DEVICE inline
#endif

namespace kvk::device {

static_assert(sizeof(int64_t) == 8 && sizeof(size_t) == 8, "kvk kernels assume a 64-bit target");

// Storage only: kernels load, store and convert them (types.h) and compute in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
inline constexpr bool kSameType = false;
template <class A>
inline constexpr bool kSameType<A, A> = true;

template <class T>
KVK_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
KVK_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace kvk::device
