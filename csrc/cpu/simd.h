// Vectors of floats for the kernels: std::experimental::simd, plus what it lacks. Each function says what it does once,
// in portable form, and has a short intrinsic form where a level has the instruction for it.
#pragma once

#include <experimental/simd>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kvk/types.h"

namespace kvk::cpu::KVK_LEVEL {

namespace stdx = std::experimental;

using V = stdx::native_simd<float>;
using VU32 = stdx::rebind_simd_t<uint32_t, V>;
using VU16 = stdx::rebind_simd_t<uint16_t, V>;

inline constexpr int W = static_cast<int>(V::size());
inline constexpr bool kManyRegisters = W == 16;  // 32 vector registers
inline constexpr float kInf = std::numeric_limits<float>::infinity();

// Scratch rows are padded to this many floats, a multiple of every level's vectors and panels.
inline constexpr int kPad = 32;
constexpr int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

template <class To, class From>
inline To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

#if defined(__AVX512F__)
inline __m512 native(V x) { return bit_cast<__m512>(x); }
#elif defined(__AVX2__)
inline __m256 native(V x) { return bit_cast<__m256>(x); }
#endif

// f(an element of the dtype of floats).
template <class F>
inline auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
#if defined(__FLT16_MANT_DIG__)
inline float to_float(f16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
#endif

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  // Round half to even; a NaN keeps its sign and becomes quiet.
  out.bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16& out) { out.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// --- loads and stores of W consecutive elements ----------------------------------------------------------------------

inline V load(const float* p) { return V(p, stdx::element_aligned); }

inline V load(const bf16* p) {
  const VU16 bits(&p->bits, stdx::element_aligned);
  return bit_cast<V>(VU32(stdx::static_simd_cast<VU32>(bits) << 16));
}

inline V load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
  return bit_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return V([p](int i) { return to_float(p[i]); });
#endif
}

// 2 W elements as two vectors, in the cheapest order: of bf16 the even and the odd ones, since a shift or a mask of a 32-bit
// word is a float already; else the first and the last half. from_pair() gives the order of memory back.
template <class T>
inline void load_pair(const T* p, V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const VU32 bits = bit_cast<VU32>(stdx::native_simd<uint16_t>(&p->bits, stdx::element_aligned));
    a = bit_cast<V>(VU32(bits << 16));
    b = bit_cast<V>(VU32(bits & 0xffff0000u));
  } else {
    a = load(p);
    b = load(p + W);
  }
}

template <class T>
inline void from_pair(V& a, V& b) {
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 even = native(a), odd = native(b);
    a = bit_cast<V>(_mm512_permutex2var_ps(even, low, odd));
    b = bit_cast<V>(_mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
#elif defined(__AVX2__)
    const __m256 low = _mm256_unpacklo_ps(native(a), native(b)), high = _mm256_unpackhi_ps(native(a), native(b));
    a = bit_cast<V>(_mm256_permute2f128_ps(low, high, 0x20));
    b = bit_cast<V>(_mm256_permute2f128_ps(low, high, 0x31));
#else
    const V even = a, odd = b;
    a = V([&](int i) { return i % 2 ? odd[i / 2] : even[i / 2]; });
    b = V([&](int i) { return i % 2 ? odd[(W + i) / 2] : even[(W + i) / 2]; });
#endif
  }
}

inline void store(V x, float* p) { x.copy_to(p, stdx::element_aligned); }

inline void store(V x, bf16* p) {
  const VU32 u = bit_cast<VU32>(x);
  VU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const auto nan = (u & 0x7fffffffu) > 0x7f800000u;
  stdx::where(nan, rounded) = (u >> 16) | 0x40u;
  stdx::static_simd_cast<VU16>(rounded).copy_to(&p->bits, stdx::element_aligned);
}

inline void store(V x, f16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(native(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(native(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) from_float(x[i], p[i]);
#endif
}

// Puts a row of floats, whole pairs of vectors at a time, into the order of load_pair().
template <class T>
inline void into_pairs(float* row, int count) {
  if constexpr (std::is_same_v<T, bf16>) {
    for (int d = 0; d + 2 * W <= count; d += 2 * W) {
      float even[W], odd[W];
      for (int i = 0; i < W; ++i) {
        even[i] = row[d + 2 * i];
        odd[i] = row[d + 2 * i + 1];
      }
      std::memcpy(row + d, even, sizeof(even));
      std::memcpy(row + d + W, odd, sizeof(odd));
    }
  }
}

// The order of memory again.
template <class T>
inline void out_of_pairs(float* row, int count) {
  for (int d = 0; d + 2 * W <= count; d += 2 * W) {
    V a = load(row + d), b = load(row + d + W);
    from_pair<T>(a, b);
    store(a, row + d);
    store(b, row + d + W);
  }
}

// Keeps x in a register over its uses: GCC would rather load it again as an operand of each, where loads are what binds.
inline V in_register(V x) {
#if defined(__AVX2__)
  auto n = native(x);
  asm("" : "+v"(n));
  return bit_cast<V>(n);
#else
  return x;
#endif
}

// The first n < W elements; the rest of the vector is 0 and the memory behind is not touched.
template <class T>
inline V load_partial(const T* p, int n) {
  alignas(64) T buffer[W] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_partial(V x, T* p, int n) {
  alignas(64) T buffer[W];
  store(x, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Eight elements in the low half of a 16-wide vector: the end of a head dim that is an odd multiple of 8.
#if defined(__AVX512F__)
inline V load_half(const float* p) { return bit_cast<V>(_mm512_zextps256_ps512(_mm256_loadu_ps(p))); }
inline V load_half(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<V>(_mm512_zextsi256_si512(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}
inline V load_half(const f16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<V>(_mm512_zextps256_ps512(_mm256_cvtph_ps(bits)));
}
#else
template <class T>
inline V load_half(const T* p) {
  return load_partial(p, 8 % W);
}
#endif

// Into L2, to be read; and into L1, to be written. Volatile: GCC takes a function that only prefetches for one without effects, and drops its calls.
inline void prefetch_l2(const void* p) {
#if defined(__SSE2__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}
inline void prefetch_to_write(void* p) {
#if defined(__SSE2__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// --- sums across lanes -----------------------------------------------------------------------------------------------

// out[i] = sum of the lanes of x_i, in an order that depends on W alone.
inline void sum_lanes(V a, V b, V c, V d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto fold = [](V x) {
    return _mm256_add_ps(_mm512_castps512_ps256(native(x)), _mm512_extractf32x8_ps(native(x), 1));
  };
#else
  const auto fold = [](V x) { return native(x); };
#endif
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = stdx::reduce(a);
  out[1] = stdx::reduce(b);
  out[2] = stdx::reduce(c);
  out[3] = stdx::reduce(d);
#endif
}

// The largest lane of a vector without NaN.
inline float max_lanes(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(native(x));
#else
  return stdx::hmax(x);
#endif
}

// --- transposition ---------------------------------------------------------------------------------------------------

#if defined(__AVX2__)
// Element j of r[i] to element i of r[j].
inline void transpose_8x8(__m256* r) {
  __m256 t[8];
  for (int j = 0; j < 8; j += 2) {
    t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
    t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
  }
  for (int j = 0; j < 8; j += 4) {
    r[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    r[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xee);
    r[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    r[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// dst[i * ld + j] = rows[j][i] for i, j in [0, 8).
template <class T>
inline void transpose_8x8(const T* const rows[8], float* dst, int ld) {
#if defined(__AVX2__)
  __m256 r[8];
  for (int j = 0; j < 8; ++j) {
#if defined(__AVX512F__)
    r[j] = _mm512_castps512_ps256(native(load_half(rows[j])));
#else
    r[j] = native(load(rows[j]));
#endif
  }
  transpose_8x8(r);
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(dst + i * ld, r[i]);
#else
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 8; ++i) dst[i * ld + j] = to_float(rows[j][i]);
  }
#endif
}

// The same of 32-bit words at any address.
inline void transpose_words_8x8(const uint8_t* const rows[8], uint32_t* dst, int ld) {
#if defined(__AVX2__)
  __m256 r[8];
  for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[j]));
  transpose_8x8(r);
  for (int i = 0; i < 8; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * ld), _mm256_castps_si256(r[i]));
#else
  for (int j = 0; j < 8; ++j) {
    uint32_t words[8];
    std::memcpy(words, rows[j], sizeof(words));
    for (int i = 0; i < 8; ++i) dst[i * ld + j] = words[i];
  }
#endif
}

// --- functions -------------------------------------------------------------------------------------------------------

// e**x for x <= 88, to 1 ulp; 0 below -87.3 (and for -inf). NaN stays NaN.
inline V exp(V x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
  const V shifted = x * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VU32 exponent = (bit_cast<VU32>(shifted) << 23) + 0x3f800000u;
  V result = p * bit_cast<V>(exponent);
  stdx::where(x < -87.3f, result) = 0.0f;
  return result;
}

// tanh(x) to about 2 ulp: an odd polynomial near 0, where the quotient would cancel, and 1 - 2 / (e**2|x| + 1) beyond.
inline V tanh(V x) {
  const V z = x * x;
  V small = -5.70498872745e-3f;
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  V a = x;
  stdx::where(x < 0.0f, a) = -x;
  V clamped = a;
  stdx::where(a > 10.0f, clamped) = 10.0f;
  V large = 1.0f - 2.0f / (exp(clamped + clamped) + 1.0f);
  stdx::where(x < 0.0f, large) = -large;
  stdx::where(a < 0.625f, large) = small;
  return large;
}

}  // namespace kvk::cpu::KVK_LEVEL
