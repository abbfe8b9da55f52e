// Few query rows straight over rows of bitmaps, with AVX2: a group of eight channels is one byte shuffle from the record into a
// vector of floats, multiplied at once. What it takes of instructions for eight channels: the bitmap's byte, its count, its
// table entry's and the next value's address, load, shuffle: 6, and a multiply-add for each query row; 2 of the loads are of
// vectors, of which Zen 4 makes 2 a cycle. Vectors are of eight floats at x86-64-v4 too, where 32 registers hold more sums:
// AVX-512 itself cannot put 16-bit elements apart, and VBMI2, which can, takes longer on Zen 4 (11.6 ns against 8 for a row of
// 128 and its products). An index of all groups made beforehand took longer as well.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "cpu/engine/dense.h"
#include "cpu/simd_bitmap.h"

namespace kvk::cpu::KVK_LEVEL {

#if defined(__AVX2__)
inline constexpr bool kSparseRows = true;
#else
inline constexpr bool kSparseRows = false;
#endif
inline constexpr int kMaxSparseRows = 4;  // more would put each row apart several times

// Register blocks of four to eight accumulators, 16 where there are 32 registers. More keys share the loads of q; all bytes of
// a row in one pass need no pointers kept from pass to pass.
template <int kRows>
inline constexpr int kDotKeys = kRows <= 2 || kManyRegisters ? 4 : 2;
template <int kRows>
inline constexpr int kSumBytes = (kManyRegisters ? 16 : 8) / std::bit_ceil(static_cast<unsigned>(kRows));
inline constexpr int kSumStep = 8;  // rows between fetches

// Steps of the prefetcher for `keys` of them.
inline int64_t sparse_score_steps(int keys, int num_rows) {
  int64_t steps = 0;
  with_rows(num_rows, [&](auto n) { steps = keys / kDotKeys<n()>; });
  return steps;
}
inline int64_t sparse_accumulate_steps(int keys, int num_rows, int dim) {
  int64_t passes = 0;
  with_rows(num_rows, [&](auto n) { passes = dim / (8 * kSumBytes<n()>)+dim / 8 % kSumBytes<n()>; });
  return passes * ((keys + kSumStep - 1) / kSumStep);
}

// Defined where kSparseRows. s[r * kBlockKeys + j] = q_r . row j, and out[r] = out[r] * scale[r] + sum over j of p[r][j] * row j,
// for up to kMaxSparseRows rows of q. dtype: of the values.
inline void sparse_scores(DType dtype, const RowsApart& rows, const float* q, int ldq, int num_rows, float* s,
                          Prefetcher& ahead);
inline void sparse_accumulate(DType dtype, const RowsApart& rows, const float* p, const float* scale, int num_rows,
                              float* out, int ldo, Prefetcher& ahead);

#if defined(__AVX2__)

// For every byte of a bitmap the shuffle of eight bfloat16, in both halves of a vector, into the upper halves of floats.
struct FloatShuffles {
  alignas(64) uint8_t apart[256][32];
  constexpr FloatShuffles() : apart{} {
    for (int bits = 0; bits < 256; ++bits) {
      int next = 0;
      for (int i = 0; i < 32; ++i) apart[bits][i] = 0x80;  // gives 0
      for (int i = 0; i < 8; ++i) {
        if ((bits >> i & 1) == 0) continue;
        apart[bits][4 * i + 2] = static_cast<uint8_t>(2 * next);
        apart[bits][4 * i + 3] = static_cast<uint8_t>(2 * next + 1);
        ++next;
      }
    }
  }
};
inline constexpr FloatShuffles kFloatShuffles;

// The eight channels of one byte of a bitmap as floats; `values` moves on to those of the next. By hand where GCC would spend 10
// instructions instead of 6: the load with its broadcast, and the count, which does not depend on what its register held.
template <class Value>
inline __m256 take_eight(uint64_t byte, const uint8_t*& values) {
  const auto* eight = reinterpret_cast<const __m128i_u*>(values);
  __m256i bits;
  if constexpr (std::is_same_v<Value, bf16>) {
    asm("vbroadcasti128 %1, %0" : "=x"(bits) : "m"(*eight));
  } else {
    bits = _mm256_castsi128_si256(_mm_loadu_si128(eight));
  }
  uint64_t count;
  asm("popcnt %1, %0" : "=r"(count) : "r"(byte) : "cc");
  values += 2 * count;
  if constexpr (std::is_same_v<Value, bf16>) {
    const __m256i control = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFloatShuffles.apart[byte]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(bits, control));
  } else {
    const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(kByteShuffles.apart[byte]));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm256_castsi256_si128(bits), control));
  }
}

// s[r * kBlockKeys + k] = q_r . row k for kRows rows of q and kKeys of a record; q in the order of memory.
template <class Value, int kRows, int kKeys>
inline void sparse_dots(const RowsApart& rows, const uint8_t* values, const uint8_t* bitmap, const float* q, int ldq,
                        float* s) {
  constexpr int kSums = kRows * kKeys, kPadded = (kSums + 3) / 4 * 4;
  const uint8_t *at[kKeys], *bits[kKeys];
  __m256 acc[kPadded];
#pragma GCC unroll 16
  for (int i = 0; i < kPadded; ++i) acc[i] = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int k = 0; k < kKeys; ++k) {
    at[k] = values;
    bits[k] = bitmap;
    values += rows.value_row_bytes;
    bitmap += rows.bitmap_row_bytes;
  }
  const int64_t bytes = rows.dim / 8;
#pragma GCC unroll 2
  for (int64_t i = 0; i < bytes; ++i, q += 8) {
    __m256 x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      x[r] = _mm256_loadu_ps(q + r * ldq);
      asm("" : "+x"(x[r]));
    }
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) {
      const __m256 eight = take_eight<Value>(bits[k][i], at[k]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r * kKeys + k] = _mm256_fmadd_ps(eight, x[r], acc[r * kKeys + k]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPadded; i += 4) {
    const __m256 ab = _mm256_hadd_ps(acc[i], acc[i + 1]), cd = _mm256_hadd_ps(acc[i + 2], acc[i + 3]);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    float sums[4];
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      if (i + e < kSums) s[(i + e) / kKeys * kBlockKeys + (i + e) % kKeys] = sums[e];
    }
  }
}

// s[r * kBlockKeys + j] for all of the rows.
template <class Value, int kRows>
[[gnu::noinline]] void sparse_scores_rows(const RowsApart& rows, const float* q, int ldq, float* s, Prefetcher& ahead) {
  constexpr int kKeys = kDotKeys<kRows>;
  const uint8_t *values = rows.values, *bitmap = rows.bitmap;
  int j = 0;
  for (; j + kKeys <= rows.count; j += kKeys) {
    ahead.step();
    sparse_dots<Value, kRows, kKeys>(rows, values, bitmap, q, ldq, s + j);
    values += kKeys * rows.value_row_bytes;
    bitmap += kKeys * rows.bitmap_row_bytes;
  }
  for (; j < rows.count; ++j) {
    sparse_dots<Value, kRows, 1>(rows, values, bitmap, q, ldq, s + j);
    values += rows.value_row_bytes;
    bitmap += rows.bitmap_row_bytes;
  }
}

// out[r][d .. d + 8 * kBytes) = out * scale[r] + sum over rows j of p[r][j] * v_j; values[j] moves on to the columns behind.
template <class Value, int kRows, int kBytes>
inline void sparse_sums(const RowsApart& rows, int d, const uint8_t** values, const float* p, const float* scale,
                        float* out, int ldo, Prefetcher& ahead) {
  __m256 acc[kRows][kBytes];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kBytes; ++i) acc[i / kBytes][i % kBytes] = _mm256_setzero_ps();
  const uint8_t* bitmap = rows.bitmap + d / 8;
  for (int j = 0; j < rows.count;) {
    ahead.step();
    const int end = std::min(j + kSumStep, rows.count);
    for (; j < end; ++j, bitmap += rows.bitmap_row_bytes) {
      const uint8_t* at = values[j];
      __m256 weight[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        weight[r] = _mm256_set1_ps(p[r * kBlockKeys + j]);
        asm("" : "+x"(weight[r]));
      }
#pragma GCC unroll 16
      for (int e = 0; e < kBytes; ++e) {
        const __m256 x = take_eight<Value>(bitmap[e], at);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][e] = _mm256_fmadd_ps(weight[r], x, acc[r][e]);
      }
      values[j] = at;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < kBytes; ++e) {
      float* to = out + r * ldo + d + 8 * e;
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(to), _mm256_set1_ps(scale[r]), acc[r][e]));
    }
  }
}

template <class Value, int kRows>
[[gnu::noinline]] void sparse_accumulate_rows(const RowsApart& rows, const float* p, const float* scale, float* out,
                                              int ldo, Prefetcher& ahead) {
  constexpr int kBytes = kSumBytes<kRows>;
  const uint8_t* values[kBlockKeys];
  for (int j = 0; j < rows.count; ++j) values[j] = rows.values + j * rows.value_row_bytes;
  int d = 0;
  for (; d + 8 * kBytes <= rows.dim; d += 8 * kBytes) {
    sparse_sums<Value, kRows, kBytes>(rows, d, values, p, scale, out, ldo, ahead);
  }
  for (; d < rows.dim; d += 8) sparse_sums<Value, kRows, 1>(rows, d, values, p, scale, out, ldo, ahead);
}

inline void sparse_scores(DType dtype, const RowsApart& rows, const float* q, int ldq, int num_rows, float* s,
                          Prefetcher& ahead) {
  with_value(dtype, [&](auto value) {
    with_rows(num_rows, [&](auto n) { sparse_scores_rows<decltype(value), n()>(rows, q, ldq, s, ahead); });
  });
}

inline void sparse_accumulate(DType dtype, const RowsApart& rows, const float* p, const float* scale, int num_rows,
                              float* out, int ldo, Prefetcher& ahead) {
  with_value(dtype, [&](auto value) {
    with_rows(num_rows, [&](auto n) { sparse_accumulate_rows<decltype(value), n()>(rows, p, scale, out, ldo, ahead); });
  });
}

#endif

}  // namespace kvk::cpu::KVK_LEVEL
