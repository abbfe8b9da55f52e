// Reduction: the online softmax of the rows a lane holds in mma fragments, and the end of a row.
#pragma once

#include "kvk/device/paged_problem.h"
#include "kvk/device/score.cuh"
#include "kvk/device/types.h"

namespace kvk::device {

// Running state of a row: acc = sum 2**(s - max) v, sum = sum 2**(s - max). A row that has seen no key: -inf and 0.
struct RowState {
  float max = -kInfinity;
  float sum = 0.0f;
};

// The four lanes of a quad hold the columns of one row.
KVK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
KVK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What to subtract before ex2: 0 for a row without keys, whose -inf - -inf would be NaN.
KVK_DEVICE float softmax_base(float max) { return max == -kInfinity ? 0.0f : max; }

// Joins two partial results of one row: returns the factors of both in (a, b), state in `a`.
struct MergeFactors {
  float a, b;
};
KVK_DEVICE MergeFactors merge_rows(RowState& a, RowState b) {
  const float max = fmaxf(a.max, b.max);
  const float base = softmax_base(max);
  const MergeFactors f = {ptx::ex2(a.max - base), ptx::ex2(b.max - base)};
  a = {max, a.sum * f.a + b.sum * f.b};
  return f;
}

// The end of a row: the sink joins, then factor * acc is the output. A row that saw no key gives 0 and -inf; a NaN in the
// sum stays NaN.
struct RowEnd {
  float factor, lse;  // lse: natural logarithm
};
KVK_DEVICE RowEnd finish_row(RowState row, const float* sink) {
  if (row.sum == 0.0f && row.max == -kInfinity) return {0.0f, -kInfinity};
  float factor = 1.0f;
  if (sink != nullptr) {
    const float s = *sink * kLog2e;
    const float max = fmaxf(row.max, s);
    const float base = softmax_base(max);
    factor = ptx::ex2(row.max - base);
    row = {max, row.sum * factor + ptx::ex2(s - base)};
  }
  return {factor / row.sum, (softmax_base(row.max) + log2f(row.sum)) * kLn2};
}

}  // namespace kvk::device
