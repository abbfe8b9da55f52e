// What schedules over packed sequences share: tiles of their blocks, columns from runs of tokens, causality, and tokens of no
// sequence.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/explain.h"
#include "core/sequences.h"
#include "cpu/grid.h"

namespace kvk::cpu {

inline int64_t blocks(int64_t len, int64_t block) { return (len + block - 1) / block; }

// Tiles of the sequences' blocks: tile i is block `block` of sequence `sequence` and part `head` of the heads.
struct TileList {
  struct Place {
    int64_t sequence, block, part;
  };
  std::vector<int64_t> starts = {0};  // blocks of the sequences before
  int64_t parts = 1;

  TileList(const Sequences& sequences, int64_t block, int64_t num_parts) : parts(num_parts) {
    for (int64_t b = 0; b < sequences.count; ++b) starts.push_back(starts.back() + blocks(sequences.len(b), block));
  }
  int64_t count() const { return starts.back() * parts; }
  Place place(int64_t tile) const {
    const int64_t index = tile / parts;
    const auto next = std::upper_bound(starts.begin(), starts.end(), index);
    const int64_t sequence = next - starts.begin() - 1;
    return {sequence, index - starts[static_cast<size_t>(sequence)], tile % parts};
  }
};

// Gathers runs of tokens of one entry after another into columns.
class Filler {
 public:
  explicit Filler(GridColumns& columns) : to_(columns) {
    to_.tokens.clear();
    to_.masked = false;
  }
  bool full() const { return to_.tokens.count == kGridColumns; }
  bool empty() const { return to_.tokens.count == 0; }
  // At most n tokens from `first` on; how many there was room for.
  int64_t add(int64_t first, int64_t n, float bias) {
    n = std::min<int64_t>(n, kGridColumns - to_.tokens.count);
    const GridRun& run = to_.tokens.add(0, 0, 0, first, 1, n);
    if (to_.biased) std::fill_n(to_.bias + run.begin, n, bias);
    return n;
  }

 private:
  GridColumns& to_;
};

// Row t of num_rows sees keys up to limit + t; key 0 of the sequence is token key_begin.
inline void hide_later_keys(GridColumns& columns, int64_t key_begin, int64_t limit, int64_t num_rows) {
  const GridTokens<kGridColumns>& tokens = columns.tokens;
  const auto key = [&](const GridRun& run) { return run.at[kGridDims - 1] - key_begin; };
  int64_t last = 0;
  for (int i = 0; i < tokens.num_runs; ++i) last = std::max(last, key(tokens.runs[i]) + tokens.runs[i].count - 1);
  columns.masked = last > limit;
  if (!columns.masked) return;
  std::fill_n(columns.seen, num_rows, 0);
  for (int i = 0; i < tokens.num_runs; ++i) {
    const GridRun& run = tokens.runs[i];
    for (int64_t t = 0; t < num_rows; ++t) {
      columns.seen[t] |= low_bits(std::min<int64_t>(run.count, limit + t + 1 - key(run))) << run.begin;
    }
  }
}

// Tokens that belong to no sequence.
inline void clear_rows(const GridProblem& p, const GridView& view, int64_t begin, int64_t end, int64_t heads,
                       int64_t dim) {
  if (explain::notes() != nullptr) return;
  const int64_t size = element_size(p.dtype);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      std::memset(static_cast<char*>(view.data) + (t * view.stride[kGridDims - 1] + h * view.head_stride) * size, 0,
                  static_cast<size_t>(dim * size));
    }
  }
}

// Queries of no sequence: out 0, lse -inf.
inline void clear_unowned_queries(const GridProblem& p, const Sequences& queries) {
  if (explain::notes() != nullptr) return;
  const int64_t unowned = queries.end(queries.count - 1), heads = int64_t{p.num_kv_heads} * p.group;
  clear_rows(p, p.out, unowned, queries.total, heads, p.head_dim_v);
  for (int64_t t = unowned; t < queries.total; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      static_cast<float*>(p.lse.data)[t * p.lse.stride[kGridDims - 1] + h * p.lse.head_stride] =
          -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace kvk::cpu
