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

// Turns rows of raw scores x, `vectors` vectors each, into weights exp(factor * x - max) in place, and updates the state.
// scale[r] becomes the factor for what row r accumulated so far. A key that is not seen (x = -inf) gets the weight -0.0,
// which no exponential gives. Returns how many those are.
//
// Every row goes through the same operations whatever rows lie beside it; a step takes W rows because one exponential
// then serves all their factors.
inline int softmax_rows(float* s, int rows, int vectors, float factor, SoftmaxRow* state, float* scale) {
  int unseen = 0;
  for (int first = 0; first < rows; first += W) {
    const int count = std::min(W, rows - first);
    alignas(64) float old_max[W], max[W], sum[padded(W)];
    std::fill(old_max + count, old_max + W, 0.0f);
    std::fill(max + count, max + W, 0.0f);
    for (int r = 0; r < count; ++r) {
      const float* row = s + (first + r) * kBlockKeys;
      V top = -kInf;  // a NaN loses every comparison: it enters the row by its weight
      for (int i = 0; i < vectors; ++i) {
        const V x = load(row + i * W) * factor;
        stdx::where(x > top, top) = x;
      }
      const float highest = max_lanes(top);
      old_max[r] = state[first + r].max;
      max[r] = highest > old_max[r] ? highest : old_max[r];
    }
    const V old = load(old_max), now = load(max);
    V shift = now;
    stdx::where(now == -kInf, shift) = 0.0f;  // nothing seen yet, or a NaN alone
    V factors = exp(old - shift);
    stdx::where(old == -kInf, factors) = 1.0f;  // of an output that is still 0
    store(shift, max);

    for (int r = 0; r < count; r += 4) {
      V total[4];
      for (int e = 0; e < 4; ++e) {
        total[e] = 0.0f;
        if (r + e >= count) continue;
        float* row = s + (first + r + e) * kBlockKeys;
        for (int i = 0; i < vectors; ++i) {
          const V x = load(row + i * W) * factor;
          V weight = exp(x - max[r + e]);
          const auto hidden = x == -kInf;
          // Assigning the scalar would lose the sign (libstdc++ masks with and-not).
          stdx::where(hidden, weight) = V(-0.0f);
          unseen += stdx::popcount(hidden);
          total[e] += weight;
          store(weight, row + i * W);
        }
      }
      sum_lanes(total[0], total[1], total[2], total[3], sum + r);
    }

    alignas(64) float scales[W];
    store(factors, scales);
    for (int r = 0; r < count; ++r) {
      SoftmaxRow& row = state[first + r];
      scale[first + r] = scales[r];
      row.sum = row.sum * scales[r] + sum[r];
      // A row without a key stays as it was, unless a NaN hid from the comparisons.
      if (row.max != -kInf || max[r] != 0.0f || sum[r] != 0.0f) row.max = max[r];
    }
  }
  return unseen;
}

// The end of a row: joins the sink, divides, writes out and lse. A row that saw no key: 0 and -inf.
inline void finish_row(const float* acc, SoftmaxRow row, const float* sink, int head_dim, DType dtype, void* out,
                       float* lse) {
  if (row.max == -kInf) {
    std::memset(out, 0, static_cast<size_t>(head_dim * element_size(dtype)));
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
  with_dtype(dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(out);
    int d = 0;
    for (; d + W <= head_dim; d += W) store(load(acc + d) * factor, to + d);
    if constexpr (W > 8) {
      if (d < head_dim) store_partial(load(acc + d) * factor, to + d, head_dim - d);
    }
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
