// Codes of 2, 3, 4 and 8 bits in vectors: element j of a row is bits [j * bits, (j + 1) * bits) of the row's bytes taken as
// one little-endian number. Eight codes are `bits` whole bytes, so everything goes in steps of eight.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// f(bits) as a constant.
template <class F>
inline void with_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 8>());
  }
}

// a where a > b, else b: b too where a is NaN.
inline V larger(V a, V b) {
#if defined(__AVX512F__)
  return bit_cast<V>(_mm512_max_ps(native(a), native(b)));
#elif defined(__AVX2__)
  return bit_cast<V>(_mm256_max_ps(native(a), native(b)));
#elif defined(__SSE2__)
  return bit_cast<V>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  stdx::where(a > b, b) = a;
  return b;
#endif
}

// a where a < b, else b: b too where a is NaN.
inline V smaller(V a, V b) {
#if defined(__AVX512F__)
  return bit_cast<V>(_mm512_min_ps(native(a), native(b)));
#elif defined(__AVX2__)
  return bit_cast<V>(_mm256_min_ps(native(a), native(b)));
#elif defined(__SSE2__)
  return bit_cast<V>(_mm_min_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  stdx::where(a < b, b) = a;
  return b;
#endif
}

// The low byte of each lane.
inline void store_bytes(VU32 x, uint8_t* p) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i v = bit_cast<__m256i>(x);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// Eight codes, one in each byte, to eight codes of kBits in the low bytes.
template <int kBits>
inline uint64_t squeeze8(uint64_t x) {
  if constexpr (kBits == 8) return x;
#if defined(__BMI2__)
  return _pext_u64(x, ((1ull << kBits) - 1) * 0x0101010101010101);
#else
  constexpr uint64_t kPairs = ((1ull << 2 * kBits) - 1) * 0x0001000100010001;
  constexpr uint64_t kQuads = ((1ull << 4 * kBits) - 1) * 0x0000000100000001;
  x = (x | x >> (8 - kBits)) & kPairs;
  x = (x | x >> (16 - 2 * kBits)) & kQuads;
  return x | x >> (32 - 4 * kBits);
#endif
}

// 16 codes of 3 bits, in the low 48, to 16 of 4 bits.
inline uint64_t widen_codes(uint64_t x) {
#if defined(__BMI2__)
  return _pdep_u64(x, 0x7777777777777777);
#else
  x = (x & 0x000000ffffff) | (x & 0xffffff000000) << 8;
  x = (x & 0x00000fff00000fff) | (x & 0x00fff00000fff000) << 4;
  x = (x & 0x003f003f003f003f) | (x & 0x0fc00fc00fc00fc0) << 2;
  return (x & 0x0707070707070707) | (x & 0x3838383838383838) << 1;
#endif
}

// n codes, a byte each, n a multiple of 8, to a row's bytes.
template <int kBits>
inline void pack_codes(const uint8_t* codes, int n, uint8_t* row) {
  for (int i = 0; i < n; i += 8, row += kBits) {
    uint64_t x;
    std::memcpy(&x, codes + i, 8);
    x = squeeze8<kBits>(x);
    std::memcpy(row, &x, kBits);
  }
}

// Code i of a row.
template <int kBits>
inline uint32_t code_at(const uint8_t* row, int i) {
  const int bit = i * kBits;
  uint32_t x = row[bit / 8];
  if (bit % 8 + kBits > 8) x |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
  return x >> bit % 8 & ((1u << kBits) - 1);
}

// Bits of codes [first, first + 8), first a multiple of 8, and nothing behind them is read.
template <int kBits>
inline uint32_t eight_codes(const uint8_t* row, int first) {
  const uint8_t* p = row + first / 8 * kBits;
  uint32_t x = 0;
  if constexpr (kBits == 3) {
    uint16_t low;
    std::memcpy(&low, p, 2);
    x = low | static_cast<uint32_t>(p[2]) << 16;
  } else {
    static_assert(kBits == 2 || kBits == 4);
    std::memcpy(&x, p, kBits);
  }
  return x;
}

// What the inner loops multiply: code - kMiddle, which lies around 0, so that a sum of products is not the small difference of
// two large ones. min + kMiddle * scale then takes the place of min.
template <int kBits>
inline constexpr float kMiddle = ((1 << kBits) - 1) / 2.0f;

// code - kMiddle of 2 and 3 bits (and 4 where a vector has 16 lanes), looked up by the low bits of each lane. Plain memory: a
// vector as a global would be made at load time, by instructions that the machine may lack.
template <int kBits>
struct LevelTable {
  alignas(64) float level[W];
  constexpr LevelTable() : level{} {
    for (int i = 0; i < W; ++i) level[i] = static_cast<float>(i % (1 << kBits)) - kMiddle<kBits>;
  }
};
template <int kBits>
inline constexpr LevelTable<kBits> kLevels;

// Codes [first, first + W) of a row as floats; first a multiple of 8, or of W where W is less.
template <int kBits>
inline V load_codes(const uint8_t* row, int first) {
#if defined(__AVX512F__)
  __m512i x;
  if constexpr (kBits == 8) {
    x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + first)));
  } else {
    const __m512i eights = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(eight_codes<kBits>(row, first))),
                                                  0xff00, static_cast<int>(eight_codes<kBits>(row, first + 8)));
    const __m512i shift =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi32(kBits));
    x = _mm512_and_si512(_mm512_srlv_epi32(eights, shift), _mm512_set1_epi32((1 << kBits) - 1));
  }
  return bit_cast<V>(_mm512_cvtepi32_ps(x));
#elif defined(__AVX2__)
  __m256i x;
  if constexpr (kBits == 8) {
    x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + first)));
  } else {
    const __m256i shift = _mm256_setr_epi32(0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits);
    x = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(eight_codes<kBits>(row, first))), shift);
    x = _mm256_and_si256(x, _mm256_set1_epi32((1 << kBits) - 1));
  }
  return bit_cast<V>(_mm256_cvtepi32_ps(x));
#else
  return V([&](int i) { return static_cast<float>(code_at<kBits>(row, first + i)); });
#endif
}

// Codes [first, first + W) less kMiddle; first as in load_codes.
template <int kBits>
inline V load_levels(const uint8_t* row, int first) {
#if defined(__AVX512F__)
  if constexpr (kBits != 8) {
    __m512i x;
    if constexpr (kBits == 2) {
      uint32_t sixteen;
      std::memcpy(&sixteen, row + first / 8 * kBits, sizeof(sixteen));
      x = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(sixteen)),
                            _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    } else {
      constexpr int b = kBits;
      x = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(eight_codes<kBits>(row, first))), 0xff00,
                                 static_cast<int>(eight_codes<kBits>(row, first + 8)));
      x = _mm512_srlv_epi32(x, _mm512_setr_epi32(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b, 0, b, 2 * b, 3 * b,
                                                 4 * b, 5 * b, 6 * b, 7 * b));
    }
    return bit_cast<V>(_mm512_permutexvar_ps(x, native(load(kLevels<kBits>.level))));
  }
#elif defined(__AVX2__)
  if constexpr (kBits == 2) {
    const __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(eight_codes<kBits>(row, first))),
                                        _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    return bit_cast<V>(_mm256_permutevar8x32_ps(native(load(kLevels<kBits>.level)), x));
  }
#endif
  return load_codes<kBits>(row, first) - kMiddle<kBits>;
}

// Code i, less kMiddle, of the words of 32 bits in each lane.
template <int kBits>
inline V word_levels(VU32 words, int i) {
  VU32 x = words >> i * kBits;
#if defined(__AVX512F__)
  if constexpr (kBits != 8) {
    return bit_cast<V>(_mm512_permutexvar_ps(bit_cast<__m512i>(x), native(load(kLevels<kBits>.level))));
  }
#elif defined(__AVX2__)
  if constexpr (kBits == 2) {
    return bit_cast<V>(_mm256_permutevar8x32_ps(native(load(kLevels<kBits>.level)), bit_cast<__m256i>(x)));
  }
#endif
  if ((i + 1) * kBits != 32) x &= (1u << kBits) - 1;
  return stdx::static_simd_cast<V>(bit_cast<stdx::rebind_simd_t<int32_t, V>>(x)) - kMiddle<kBits>;
}

// Codes [first, first + 8) in the low half of a 16-wide vector, 0 above.
template <int kBits>
inline V load_codes_half(const uint8_t* row, int first) {
#if defined(__AVX512F__)
  if constexpr (kBits != 8) {
    const __m512i shift =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0), _mm512_set1_epi32(kBits));
    const __m512i x =
        _mm512_maskz_srlv_epi32(0x00ff, _mm512_set1_epi32(static_cast<int>(eight_codes<kBits>(row, first))), shift);
    return bit_cast<V>(_mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32((1 << kBits) - 1))));
  }
#endif
  return V([&](int i) { return i < 8 ? static_cast<float>(code_at<kBits>(row, first + i)) : 0.0f; });
}

}  // namespace kvk::cpu::KVK_LEVEL
