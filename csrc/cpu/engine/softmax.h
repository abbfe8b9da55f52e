// Reduction: the online softmax of one row, and what becomes of it at the end.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/paged_problem.h"
#include "cpu/engine/schedule.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// Running state of a row: out = sum exp(s - max) v, sum = sum exp(s - max).
struct SoftmaxRow {
  float max = -kInf;
  float sum = 0.0f;
};

// Turns the scores of `vectors` vectors into weights exp(s - max) in place, and updates the state. Returns the factor for
// what was accumulated so far. A key that is not seen (s = -inf) gets the weight -0.0, which no exponential gives, and is
// counted in `unseen`.
inline float softmax_update(float* s, int vectors, SoftmaxRow& row, int& unseen) {
  V top = -kInf;
  for (int i = 0; i < vectors; ++i) {
    const V x = load(s + i * W);
    stdx::where(x > top, top) = x;
  }
  float max = row.max;
  for (int i = 0; i < W; ++i) max = top[i] > max ? top[i] : max;
  if (max == -kInf) {
    // Nothing seen yet, unless a NaN hid from the comparisons: it must come out of the row as NaN.
    bool nan = false;
    for (int i = 0; i < vectors * W; ++i) nan |= s[i] != s[i];
    if (!nan) {
      std::fill(s, s + vectors * W, -0.0f);
      unseen += vectors * W;
      return 1.0f;
    }
    max = 0.0f;
  }
  V total = 0.0f;
  for (int i = 0; i < vectors; ++i) {
    const V x = load(s + i * W);
    V weight = exp(x - max);
    const auto hidden = x == -kInf;
    stdx::where(hidden, weight) = V(-0.0f);  // assigning the scalar would lose the sign (libstdc++ masks with and-not)
    unseen += stdx::popcount(hidden);
    total += weight;
    store(weight, s + i * W);
  }
  float sums[4];
  sum_lanes(total, total, total, total, sums);
  const float scale = row.max == -kInf ? 0.0f : std::exp(row.max - max);
  row.sum = row.sum * scale + sums[0];
  row.max = max;
  return scale;
}

// The end of a row: joins the sink, divides, writes out and lse. A row that saw no key: 0 and -inf.
template <class T>
inline void finish_row(const float* acc, SoftmaxRow row, const float* sink, int head_dim, T* out, float* lse) {
  if (row.max == -kInf) {
    for (int d = 0; d < head_dim; ++d) from_float(0.0f, out[d]);
    *lse = -kInf;
    return;
  }
  float factor = 1.0f;
  if (sink != nullptr) {
    const float max = *sink > row.max ? *sink : row.max;
    factor = std::exp(row.max - max);
    row.sum = row.sum * factor + std::exp(*sink - max);
    row.max = max;
  }
  *lse = row.max + std::log(row.sum);
  factor /= row.sum;
  int d = 0;
  for (; d + W <= head_dim; d += W) store(load(acc + d) * factor, out + d);
  if (d < head_dim) store_partial(load(acc + d) * factor, out + d, head_dim - d);
}

}  // namespace kvk::cpu::KVK_LEVEL
