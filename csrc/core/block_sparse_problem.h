// The checked problem of block-sparse attention, as the backends get it.
#pragma once

#include "core/grid_problem.h"
#include "kvk/block_sparse.h"

namespace kvk {

// Boundaries of packed sequences, or one sequence.
struct Sequences {
  const int32_t* starts = nullptr;  // null: one sequence of `total` tokens
  int64_t stride = 0, count = 1, total = 0;

  int64_t begin(int64_t b) const { return starts ? starts[b * stride] : 0; }
  int64_t end(int64_t b) const { return starts ? starts[(b + 1) * stride] : total; }
  int64_t len(int64_t b) const { return end(b) - begin(b); }
};

struct BlockSparseProblem : GridProblem {
  Sequences queries, keys;
  BlockPattern pattern;
  bool causal = false;

  int64_t num_heads() const { return int64_t{num_kv_heads} * group; }
  int64_t pattern_batches() const { return pattern.row_ptr.shape[0]; }
  int64_t pattern_heads() const { return pattern.row_ptr.shape[1]; }
  // Row m of the pattern of sequence b and query head h: entries [row(m), row(m + 1)).
  const int32_t* row_ptr(int64_t b, int64_t h, int64_t m) const { return at<const int32_t>(pattern.row_ptr, b, h, m); }
  int64_t col(int64_t b, int64_t h, int64_t entry) const { return *at<const int32_t>(pattern.col_idx, b, h, entry); }
  float bias(int64_t b, int64_t h, int64_t entry) const { return *at<const float>(*pattern.entry_bias, b, h, entry); }

 private:
  template <class E>
  static E* at(const Tensor& t, int64_t b, int64_t h, int64_t i) {
    return t.ptr<E>() + (t.shape[0] > 1 ? b : 0) * t.stride[0] + (t.shape[1] > 1 ? h : 0) * t.stride[1] +
           i * t.stride[2];
  }
};

}  // namespace kvk
