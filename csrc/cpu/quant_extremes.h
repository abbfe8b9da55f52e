// The smallest and the largest element of groups, and whether one of them is NaN or infinite.
//
// 16-bit floats are compared as integers: with the low 15 bits of negative ones turned over they are in order, NaN beyond the
// infinities. So a vector holds twice as many, and nothing needs converting.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/quant_groups.h"

namespace kvk::cpu::KVK_LEVEL {

using VS16 = stdx::native_simd<int16_t>;
inline constexpr int kWords = static_cast<int>(VS16::size());

template <class T>
inline constexpr bool kSortable = sizeof(T) == 2;
template <class T>
inline constexpr int16_t kInfinityBits = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;

// To the order of integers and back.
inline VS16 sorted(VS16 x) { return x ^ ((x >> 15) & VS16(0x7fff)); }

template <class T>
inline VS16 load_sorted(const T* p) {
  return sorted(VS16(reinterpret_cast<const int16_t*>(&p->bits), stdx::element_aligned));
}

inline VS16 smaller(VS16 a, VS16 b) {
#if defined(__AVX512F__)
  return bit_cast<VS16>(_mm512_min_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VS16>(_mm256_min_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return stdx::min(a, b);
#endif
}
inline VS16 larger(VS16 a, VS16 b) { return ~smaller(~a, ~b); }

// The smallest lane.
inline int16_t min_lane(VS16 x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512i all = bit_cast<__m512i>(x);
  const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
  const __m256i half = bit_cast<__m256i>(x);
#endif
  const __m128i eight = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i flip = _mm_set1_epi16(-0x8000);
  return static_cast<int16_t>(_mm_cvtsi128_si32(_mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(eight, flip)), flip)));
#else
  return stdx::hmin(x);
#endif
}

struct SortedExtremes {
  VS16 low = std::numeric_limits<int16_t>::max(), not_high = std::numeric_limits<int16_t>::max();
  void see(VS16 x) {
    low = smaller(x, low);
    not_high = smaller(~x, not_high);
  }
};

struct Extremes {
  V low = kInf, high = -kInf, bad = 0.0f;
  void see(V x) {
    low = smaller(x, low);
    high = larger(x, high);
    bad += x * 0.0f;
  }
};

// W elements of a row of `left` remaining, zeros behind its end.
template <class T>
inline V load_columns(const T* p, int64_t left) {
  return left >= W ? load(p) : load_partial(p, static_cast<int>(left));
}

// Extremes of kVecs vectors of columns over `tokens` rows, to entries `at` and on.
template <int kVecs, class T>
inline void column_extremes(const T* x, int64_t stride, int tokens, int64_t left, Groups& groups, int at) {
  Extremes e[kVecs];
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i)
      e[i].see(kVecs > 1 ? load(x + t * stride + i * W) : load_columns(x + t * stride, left));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) {
    store(e[i].low, groups.low + at + i * W);
    store(e[i].high, groups.high + at + i * W);
    store(e[i].bad, groups.bad + at + i * W);
  }
}

// One entry from the extremes of words.
template <class T>
inline void set_sorted(int16_t low, int16_t high, Groups& groups, int at) {
  constexpr int16_t kInfinity = kInfinityBits<T>;
  const auto number = [](int16_t x) {
    T bits;
    bits.bits = static_cast<uint16_t>(x ^ ((x >> 15) & 0x7fff));
    return to_float(bits);
  };
  groups.low[at] = number(low);
  groups.high[at] = number(high);
  groups.bad[at] = low <= ~kInfinity || high >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
}

// The same of kVecs vectors of words.
template <int kVecs, class T>
inline void column_extremes_sorted(const T* x, int64_t stride, int tokens, Groups& groups, int at) {
  SortedExtremes e[kVecs];
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) e[i].see(load_sorted(x + t * stride + i * kWords));
  }
  alignas(64) T low[kWords], high[kWords];
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    sorted(e[i].low).copy_to(reinterpret_cast<int16_t*>(&low->bits), stdx::element_aligned);
    sorted(~e[i].not_high).copy_to(reinterpret_cast<int16_t*>(&high->bits), stdx::element_aligned);
    for (int j = 0; j < kWords; j += W) {
      const V lows = load(low + j), highs = load(high + j);
      const int to = at + i * kWords + j;
      store(lows, groups.low + to);
      store(highs, groups.high + to);
      store(lows * 0.0f + highs * 0.0f, groups.bad + to);
    }
  }
}

// Extremes of one group of consecutive elements, 16 of them or more.
template <class T>
inline void row_extremes(const T* x, int group, Groups& groups, int at) {
  if constexpr (kSortable<T>) {
    if (group % kWords == 0) {
      SortedExtremes e;
      for (int d = 0; d < group; d += kWords) e.see(load_sorted(x + d));
      return set_sorted<T>(min_lane(e.low), static_cast<int16_t>(~min_lane(e.not_high)), groups, at);
    }
  }
  Extremes e;
  for (int d = 0; d < group; d += W) e.see(load(x + std::min(d, group - W)));  // the last two may overlap
  groups.low[at] = stdx::hmin(e.low);
  groups.high[at] = stdx::hmax(e.high);
  groups.bad[at] = stdx::reduce(e.bad);
}

}  // namespace kvk::cpu::KVK_LEVEL
