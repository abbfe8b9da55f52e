// The two products with a run of tokens of one record: scores, by floats (lse is held to float32's error), and weighted sums, by
// integers for 16-bit queries where the level has them and the format suits them.
#pragma once

#include "cpu/engine/quant_int_sums.h"
#include "cpu/engine/quant_scores.h"

namespace kvk::cpu::KVK_LEVEL {

template <class T>
inline constexpr bool kIntegerDots = kHasWords && sizeof(T) == 2;

// s[r * kBlockKeys + j] = q_r . k_j for `count` tokens of a record from token `offset`.
template <int kBits>
inline void quant_scores(const Record& record, int offset, int count, const float* q, int ldq, int num_rows, float* s,
                         Prefetcher& ahead) {
  if (record.part.along_tokens) {
    scores_along_tokens<kBits>(record, offset, count, q, ldq, num_rows, s, ahead);
  } else {
    scores_along_channels<kBits>(record, offset, count, q, ldq, num_rows, s, ahead);
  }
}

template <int kBits, bool kIntegers, int kRows>
inline void accumulate_rows(const Record& record, int offset, int count, const float* p, const float* factor,
                            float* out, int ldo, Prefetcher& ahead) {
#if defined(__AVX2__)
  if constexpr (kIntegers && kBits != 3) {
    if (int_sums_fit(record)) {
      if (record.part.along_tokens) {
        return int_accumulate_along_tokens<kBits, kRows>(record, offset, count, p, factor, out, ldo, ahead);
      }
      return int_accumulate_along_channels<kBits, kRows>(record, offset, count, p, factor, out, ldo, ahead);
    }
  }
#endif
  if (record.part.along_tokens) {
    accumulate_along_tokens<kBits, kRows>(record, offset, count, p, factor, out, ldo, ahead);
  } else {
    accumulate_along_channels<kBits, kRows>(record, offset, count, p, factor, out, ldo, ahead);
  }
}

// out[r] = out[r] * factor[r] + sum over `count` tokens from `offset` of p[r][t] * v_t.
template <int kBits, bool kIntegers>
inline void quant_accumulate(const Record& record, int offset, int count, const float* p, const float* factor,
                             int num_rows, float* out, int ldo, Prefetcher& ahead) {
  for (int r = 0; r < num_rows; r += 4) {
    const auto rows = [&](auto n) {
      accumulate_rows<kBits, kIntegers, n()>(record, offset, count, p + r * kBlockKeys, factor + r, out + r * ldo, ldo,
                                             ahead);
    };
    with_rows(num_rows - r, rows);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
