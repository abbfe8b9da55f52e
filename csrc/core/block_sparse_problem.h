// The checked problems of block-sparse and vertical-slash attention, as the backends get them.
#pragma once

#include "core/grid_problem.h"
#include "core/sequences.h"
#include "kvk/block_sparse.h"

namespace kvk {

struct BlockSparseProblem : GridProblem {
  Sequences queries, keys;
  BlockPattern pattern;
  bool causal = false;

  int64_t num_heads() const { return int64_t{num_kv_heads} * group; }
  int64_t pattern_batches() const { return pattern.row_ptr.shape[0]; }
  int64_t pattern_heads() const { return pattern.row_ptr.shape[1]; }
  // Row m of the pattern of sequence b and query head h: entries [row(m), row(m + 1)).
  const int32_t* row_ptr(int64_t b, int64_t h, int64_t m) const {
    return shared_at<const int32_t>(pattern.row_ptr, b, h, m);
  }
  int64_t col(int64_t b, int64_t h, int64_t entry) const {
    return *shared_at<const int32_t>(pattern.col_idx, b, h, entry);
  }
  float bias(int64_t b, int64_t h, int64_t entry) const {
    return *shared_at<const float>(*pattern.entry_bias, b, h, entry);
  }
};

struct VerticalSlashProblem : GridProblem {
  Sequences queries, keys;
  Tensor vertical, slash;  // [B | 1, Hq | 1, N]
};

}  // namespace kvk
