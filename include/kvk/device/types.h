// Numbers and vectors of a kernel: conversions of the 16-bit floats, and loads and stores of 4, 8 and 16 bytes.
//
// Kernels hold 16-bit data as words of two elements, the lower-numbered one in bits 0 to 15.
#pragma once

#include "kvk/device/ptx_math.h"
#include "kvk/device/ptx_memory.h"

namespace kvk::device {

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kNaN = __builtin_bit_cast(float, 0x7fffffff);
KVK_DEVICE bool is_nan(float x) { return x != x; }

KVK_DEVICE float to_float(float x) { return x; }
KVK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
KVK_DEVICE float to_float(f16 x) { return ptx::cvt_f32_from_f16(x.bits); }

// Rounds half to even; values past the largest f16 become infinite.
template <class T>
KVK_DEVICE T from_float(float x) {
  static_assert(kSameType<T, float> || kSameType<T, bf16> || kSameType<T, f16>);
  if constexpr (kSameType<T, bf16>) {
    return bf16{ptx::cvt_bf16(x)};
  } else if constexpr (kSameType<T, f16>) {
    return f16{ptx::cvt_f16(x)};
  } else {
    return x;
  }
}

// A word of two T (bf16 or f16), and back.
template <class T>
KVK_DEVICE uint32_t pack2(float lo, float hi) {
  static_assert(kSameType<T, bf16> || kSameType<T, f16>);
  if constexpr (kSameType<T, bf16>) {
    return ptx::cvt_bf16x2(lo, hi);
  } else {
    return ptx::cvt_f16x2(lo, hi);
  }
}
template <class T>
KVK_DEVICE float2 unpack2(uint32_t word) {
  static_assert(kSameType<T, bf16> || kSameType<T, f16>);
  if constexpr (kSameType<T, bf16>) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    return make_float2(ptx::cvt_f32_from_f16(uint16_t(word)), ptx::cvt_f32_from_f16(uint16_t(word >> 16)));
  }
}

// kWords words (1, 2 or 4) that move as one. They must lie on a multiple of their size, in global or shared memory.
template <int kWords>
struct alignas(4 * kWords) Words {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  uint32_t w[kWords];
};

template <int kWords>
KVK_DEVICE Words<kWords> load_words(const void* p KVK_LOC) {
#if KVK_EMULATOR
  Words<kWords> v;
  emu::read(&v, p, sizeof v, loc);
  return v;
#else
  if constexpr (kWords == 4) {
    const uint4 v = *static_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kWords == 2) {
    const uint2 v = *static_cast<const uint2*>(p);
    return {{v.x, v.y}};
  } else {
    return {{*static_cast<const uint32_t*>(p)}};
  }
#endif
}

template <int kWords>
KVK_DEVICE void store_words(void* p, const Words<kWords>& v KVK_LOC) {
#if KVK_EMULATOR
  emu::write(p, &v, sizeof v, loc);
#else
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(p) = make_uint2(v.w[0], v.w[1]);
  } else {
    *static_cast<uint32_t*>(p) = v.w[0];
  }
#endif
}

// Over the lanes of a warp, in all of them.
template <class T>
KVK_DEVICE T warp_sum(T x) {
  KVK_UNROLL
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// 8 elements.
template <class T>
KVK_DEVICE void unpack(const Words<4>& words, float (&x)[8]) {
  KVK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(words.w[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// As load_words<4>, for global memory that nothing writes during the launch and that is read once: bypasses L1.
KVK_DEVICE Words<4> load_words_once(const void* p KVK_LOC) {
  const uint4 v = ptx::ld_global_nc_16(p KVK_PASS_LOC);
  return {{v.x, v.y, v.z, v.w}};
}

}  // namespace kvk::device
