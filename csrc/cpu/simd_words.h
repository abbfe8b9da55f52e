// Integer dot products of codes against 16-bit numbers, for levels that multiply and add pairs of 16-bit integers in 256-bit
// vectors. Codes are taken in chunks of 64; within one they come in the order that unpacking costs least in, and
// into_code_order() brings what they are multiplied with into the same order.
#pragma once

#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

#if defined(__AVX2__)
inline constexpr bool kHasWords = true;

using Words = __m256i;  // 16 x int16
using Sums = __m256i;   // 8 x int32

inline constexpr int kChunk = 64;  // codes

inline Words load_words(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Sums zero_sums() { return _mm256_setzero_si256(); }

// Sums of the products of neighbouring words.
inline Sums dot2(Words a, Words b) { return _mm256_madd_epi16(a, b); }

// 64 words, word 4 lane + k to lane `lane` of vector k; at 8 bits as they are.
template <int kBits>
inline void into_code_order(const int16_t* p, int16_t* to) {
  const auto put = [to](int i, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), x); };
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i) put(i, load_words(p + 16 * i));
  } else {
    // Four words, one of each output, belong to 64 bits: gather them as pairs, then exchange pairs between the vectors.
    const __m256i by_four = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10,
                                             11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i natural = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm256_shuffle_epi8(load_words(p + 16 * i), by_four);
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    put(0, _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(a, c), natural));
    put(1, _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(a, c), natural));
    put(2, _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(b, d), natural));
    put(3, _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(b, d), natural));
  }
}

// Four rows of 32 bytes to 4 x [8 columns][4 rows]: columns 8 i and on to to + i * stride.
inline void interleave_rows(const uint8_t* const* rows, uint8_t* to, int64_t stride) {
  __m256i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i]));
  const __m256i ab_low = _mm256_unpacklo_epi8(x[0], x[1]), ab_high = _mm256_unpackhi_epi8(x[0], x[1]);
  const __m256i cd_low = _mm256_unpacklo_epi8(x[2], x[3]), cd_high = _mm256_unpackhi_epi8(x[2], x[3]);
  const __m256i a = _mm256_unpacklo_epi16(ab_low, cd_low), b = _mm256_unpackhi_epi16(ab_low, cd_low);
  const __m256i c = _mm256_unpacklo_epi16(ab_high, cd_high), d = _mm256_unpackhi_epi16(ab_high, cd_high);
  const auto put = [&](int i, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride), v); };
  put(0, _mm256_permute2x128_si256(a, b, 0x20));
  put(1, _mm256_permute2x128_si256(c, d, 0x20));
  put(2, _mm256_permute2x128_si256(a, b, 0x31));
  put(3, _mm256_permute2x128_si256(c, d, 0x31));
}

// The same of 8 columns.
inline void interleave_rows_8(const uint8_t* const* rows, uint8_t* to) {
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i]));
  const __m128i ab = _mm_unpacklo_epi8(x[0], x[1]), cd = _mm_unpacklo_epi8(x[2], x[3]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(ab, cd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi16(ab, cd));
}

// Code i of every byte of interleaved rows (0, 2), or (1, 3), as pairs of words.
template <int kBits>
inline Words even_rows(__m256i bytes, int i) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, i * kBits), _mm256_set1_epi16((1 << kBits) - 1));
}
template <int kBits>
inline Words odd_rows(__m256i bytes, int i) {
  const __m256i x = _mm256_srli_epi16(bytes, 8 + i * kBits);
  return (i + 1) * kBits == 8 ? x : _mm256_and_si256(x, _mm256_set1_epi16((1 << kBits) - 1));
}

inline __m256i load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// A pair of weights for every lane.
inline Words weight_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return _mm256_set1_epi32(pair);
}

// Weights of rows 0, 1, 2, 3, ... to 0, 2, 1, 3, ...: pairs as even_rows() and odd_rows() have them.
inline Words into_row_pairs(Words x) {
  return _mm256_shuffle_epi8(x, _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3,
                                                 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
}

using V8 = stdx::resize_simd_t<8, V>;

inline V8 to_floats(Sums x) { return bit_cast<V8>(_mm256_cvtepi32_ps(x)); }

// x[i][c] is element N c + i of 8 N: brings them into their order. N: 1, 2 or 4.
template <int N>
inline void interleave(V8* x) {
  const auto native8 = [](V8 v) { return bit_cast<__m256>(v); };
  if constexpr (N == 2) {
    const __m256 low = _mm256_unpacklo_ps(native8(x[0]), native8(x[1]));
    const __m256 high = _mm256_unpackhi_ps(native8(x[0]), native8(x[1]));
    x[0] = bit_cast<V8>(_mm256_permute2f128_ps(low, high, 0x20));
    x[1] = bit_cast<V8>(_mm256_permute2f128_ps(low, high, 0x31));
  } else if constexpr (N == 4) {
    const __m256 a = _mm256_unpacklo_ps(native8(x[0]), native8(x[1]));
    const __m256 b = _mm256_unpackhi_ps(native8(x[0]), native8(x[1]));
    const __m256 c = _mm256_unpacklo_ps(native8(x[2]), native8(x[3]));
    const __m256 d = _mm256_unpackhi_ps(native8(x[2]), native8(x[3]));
    const __m256 columns[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee),
                               _mm256_shuffle_ps(b, d, 0x44), _mm256_shuffle_ps(b, d, 0xee)};  // (0, 4), (1, 5), ...
    x[0] = bit_cast<V8>(_mm256_permute2f128_ps(columns[0], columns[1], 0x20));
    x[1] = bit_cast<V8>(_mm256_permute2f128_ps(columns[2], columns[3], 0x20));
    x[2] = bit_cast<V8>(_mm256_permute2f128_ps(columns[0], columns[1], 0x31));
    x[3] = bit_cast<V8>(_mm256_permute2f128_ps(columns[2], columns[3], 0x31));
  }
}

// 16 floats times factor, rounded to whole numbers, halves to even; they lie within 32767.
inline Words round_words(const float* x, float factor) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(native(load(x) * factor)));
#else
  const __m256i low = _mm256_cvtps_epi32(native(load(x) * factor)),
                high = _mm256_cvtps_epi32(native(load(x + 8) * factor));
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
#endif
}

inline void store_words(Words x, int16_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// The larger magnitude of each lane; a NaN is larger than infinity.
inline V larger_magnitude(V x, V largest) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_and_si512(bit_cast<__m512i>(x), _mm512_set1_epi32(0x7fffffff));
  return bit_cast<V>(_mm512_max_epu32(bits, bit_cast<__m512i>(largest)));
#else
  const __m256i bits = _mm256_and_si256(bit_cast<__m256i>(x), _mm256_set1_epi32(0x7fffffff));
  return bit_cast<V>(_mm256_max_epu32(bits, bit_cast<__m256i>(largest)));
#endif
}

// out[i] = the largest lane of x[i], lanes compared as bits, for four of them.
inline void max_magnitudes(const V* x, float* out) {
  __m256i y[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m512i bits = bit_cast<__m512i>(x[i]);
    y[i] = _mm256_max_epu32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
#else
    y[i] = bit_cast<__m256i>(x[i]);
#endif
  }
  const auto pairs = [](__m256i a, __m256i b) {
    return _mm256_max_epu32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  };
  const __m256i ab = pairs(y[0], y[1]), cd = pairs(y[2], y[3]);
  const __m256i abcd = _mm256_max_epu32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m128i all = _mm_max_epu32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  _mm_storeu_ps(out, _mm_castsi128_ps(all));
}

#else
inline constexpr bool kHasWords = false;
#endif

}  // namespace kvk::cpu::KVK_LEVEL
