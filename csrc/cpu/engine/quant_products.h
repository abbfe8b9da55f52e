// The weighted sums of a run of tokens of one record: by integers for 16-bit queries where the level has them and the format
// suits them, else by floats. (Scores are by floats: lse is held to float32's error.)
#pragma once

#include "cpu/engine/quant_int_sums.h"

namespace kvk::cpu::KVK_LEVEL {

// Whether values of queries of this dtype are summed by integers.
inline bool integer_sums(DType dtype) { return kHasWords && dtype != DType::f32; }

// out[r] = out[r] * factor[r] + sum over `count` tokens from `offset` of p[r][t] * v_t, for any number of rows.
inline void quant_accumulate(const Record& record, int offset, int count, const WeightedRows& rows,
                             [[maybe_unused]] bool integers, Prefetcher& ahead) {
  for (int r = 0; r < rows.num_rows; r += 4) {
    const WeightedRows part = rows.part(r, std::min(4, rows.num_rows - r));
#if defined(__AVX2__)
    if (integers && int_sums_fit(record)) {
      accumulate_integers(record, offset, count, part, ahead);
      continue;
    }
#endif
    accumulate_floats(record, offset, count, part, ahead);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
