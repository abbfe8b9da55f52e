// Groups on their way into codes: what is stored of each, and the codes of its elements.
#pragma once

#include <algorithm>

#include "cpu/simd_codes.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kBatch = 128;  // groups, or columns, whose scales are worked out together
inline constexpr float kF16Max = 65504.0f;

// One entry for each group of a batch. The arrays hold whole vectors.
struct Groups {
  alignas(64) float low[kBatch], high[kBatch];
  alignas(64) float bad[kBatch];      // NaN where the group holds a NaN or an infinity
  alignas(64) float min[kBatch];      // as stored
  alignas(64) float top[kBatch];      // scale * (2**bits - 1): elements beyond min + top saturate
  alignas(64) float divisor[kBatch];  // the stored scale; 1 where it is 0
  alignas(64) float inverse[kBatch];  // 1 / scale; 0 where it is 0

  bool wide = false;  // an element may lie so far out of its group's range that encode_32() cannot take it

  // From low, high and bad: what is stored, and what codes are made with.
  void finish(int count, float clip, int bits, f16* scale_out, f16* min_out) {
    if (clip != 1.0f) {
      for (int i = 0; i < count; ++i) {
        if (low[i] == high[i]) continue;
        low[i] *= clip;
        high[i] *= clip;
      }
      // The products are rounded by themselves: the compiler may not fuse them into the difference below.
      asm volatile("" : : "r"(low), "r"(high) : "memory");
    }
    const auto levels = static_cast<float>((1 << bits) - 1);
    wide = clip < 0.001f;
    alignas(64) f16 half[W];
    for (int i = 0; i < count; i += W) {
      const int n = std::min(W, count - i);
      const auto round_to_f16 = [&](V x, f16* out) {
        store(x, half);
        std::memcpy(out, half, static_cast<size_t>(n) * sizeof(f16));
        return load(half);
      };
      const V sick = load(bad + i);
      const auto is_bad = sick != sick;
      V smallest = smaller(larger(load(low + i), V(-kF16Max)), V(kF16Max)) + 0.0f;  // + 0: -0 becomes 0
      stdx::where(is_bad, smallest) = V(std::numeric_limits<float>::quiet_NaN());
      smallest = round_to_f16(smallest, min_out + i);
      V step = (load(high + i) - smallest) / levels;
      step = round_to_f16(smaller(larger(step, V(0.0f)), V(kF16Max)), scale_out + i);
      wide |= stdx::any_of(step >= kF16Max);
      V divide_by = step;
      stdx::where(step == 0.0f, divide_by) = V(1.0f);
      store(smallest, min + i);
      store(step * levels, top + i);
      store(divide_by, divisor + i);
      V reciprocal = 1.0f / divide_by;
      stdx::where(step == 0.0f, reciprocal) = V(0.0f);
      store(reciprocal, inverse + i);
    }
  }
};

// round_half_even((x - min) / scale), saturated: 0 where x - min is NaN.
inline void encode(V x, V min, V top, V divisor, uint8_t* to) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: the sum's low bits are the rounded quotient
  const V t = smaller(larger(x - min, V(0.0f)), top);
  store_bytes(bit_cast<VU32>(V(t / divisor + kRound)) & 0xffu, to);
}

#if defined(__AVX2__)

// 32 floats to the nearest whole numbers, saturated to bytes. NaN: 0.
inline __m256i saturated_bytes(const V* x) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(native(x[0])));
  const __m256i high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(native(x[1])));
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
#else
  const auto words = [x](int i) {
    return _mm256_packs_epi32(_mm256_cvtps_epi32(native(x[i])), _mm256_cvtps_epi32(native(x[i + 1])));
  };
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words(0), words(2)),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}

// 32 codes, a byte each, to a row's bytes.
template <int kBits>
inline void pack_32(__m256i codes, uint8_t* to) {
  if constexpr (kBits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  } else if constexpr (kBits == 4) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
  } else if constexpr (kBits == 2) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
    const __m256i low = _mm256_shuffle_epi8(fours, _mm256_set1_epi32(0x0c080400));
    const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), all);
  } else {
    alignas(32) uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), codes);
    pack_codes<kBits>(bytes, 32, to);
  }
}

// The codes of 32 elements, packed, without a division: (x - min) * inverse is within 2**-14 of the quotient. Where one lies that
// near to halfway between two codes nothing is written and the answer is no: encode() must decide.
template <int kBits, class T, class Column>
inline bool encode_32(const T* x, Column&& column, uint8_t* to) {
  constexpr float kNear = 0x1p-12f;
  constexpr int kVecs = 32 / W;
  V below[kVecs], above[kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    V min, inverse;
    column(i * W, min, inverse);
    const V t = load(x + i * W) - min;
    below[i] = t * inverse - kNear;
    above[i] = t * inverse + kNear;
  }
  const __m256i levels = _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1));
  const __m256i codes = _mm256_min_epu8(saturated_bytes(below), levels);
  const __m256i others = _mm256_min_epu8(saturated_bytes(above), levels);
  if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(codes, others)) != -1) return false;
  pack_32<kBits>(codes, to);
  return true;
}

#else

template <int kBits, class T, class Column>
inline bool encode_32(const T*, Column&&, uint8_t*) {
  return false;
}

#endif

}  // namespace kvk::cpu::KVK_LEVEL
