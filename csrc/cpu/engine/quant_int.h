// Rows of floats as 16-bit integers with one factor each, for integer dot
// products with codes. Rounding to 2**-16 of the largest element is far below
// the rounding of a 16-bit float, and each row's is its own: no other row,
// request or thread enters it.
#pragma once

#include "cpu/engine/quant_record.h"
#include "cpu/simd_words.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kSumBytes = 8;  // bytes of a row whose columns are summed together

#if defined(__AVX2__)

// How a row became integers: x ~ factor * integer. Not `fit`: it holds NaN or
// infinities, or all of it is so small that its factor would not be a normal
// number; floats take such a row.
struct IntRow {
  float factor;
  bool fit;
};

// `count` <= 4 rows of n floats, n a multiple of 16, to integers in pairs as even_rows() and odd_rows() have them. largest: four
// vectors, of the largest magnitudes of each row.
inline void to_row_pairs(const float* x, int ldx, int count, int n, const V* largest, int16_t* to, int ldt,
                         IntRow* rows) {
  constexpr float kLimit = 32767.0f, kTiny = 1e-30f;
  float top[4];
  max_magnitudes(largest, top);
  for (int r = 0; r < count; ++r) {
    rows[r].fit = top[r] == 0.0f || (top[r] > kTiny && top[r] < kInf);
    rows[r].factor = top[r] / kLimit;
    const float inverse = top[r] > kTiny ? kLimit / top[r] : 0.0f;
    for (int i = 0; i < n; i += 16) {
      store_words(into_row_pairs(round_words(x + r * ldx + i, inverse)), to + r * ldt + i);
    }
  }
}

#endif

}  // namespace kvk::cpu::KVK_LEVEL
