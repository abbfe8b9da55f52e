// The attention engine: one item (a split of a tile) = schedule x format x score x reduction.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/engine/dense.h"
#include "cpu/engine/panel.h"
#include "cpu/engine/schedule.h"
#include "cpu/engine/score.h"
#include "cpu/engine/softmax.h"
#include "cpu/levels.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// A worker's memory for one item, carved from one aligned buffer.
struct Scratch {
  int ldq, ldo, rows;
  float* q;           // [rows, ldq] fp32
  float* out;         // [rows, ldo] running output
  float* s;           // [rows, kBlockKeys] scores, then weights; of a panel tile only the present head's
  float* scale;       // [rows] factor of the running output in this block
  SoftmaxRow* state;  // [rows]
  float* k_panels;    // [kBlockKeys / kPanelWidth][head_dim][kPanelWidth], panel tiles only
  float* v_panels;    // [ldo / kPanelWidth][kValuePanel]: [kBlockKeys][kPanelWidth] and a gap, panel tiles only

  // Lays the parts out from base (null: only counts); score_rows: rows of s. Returns the bytes used.
  int64_t carve(char* base, const PagedProblem& p, int num_rows, int score_rows, bool panels) {
    ldq = padded(p.head_dim);
    ldo = padded(p.head_dim_v);
    rows = num_rows;
    Carver parts(base);
    parts.take(q, int64_t{rows} * ldq);
    parts.take(out, int64_t{rows} * ldo);
    parts.take(s, int64_t{score_rows} * kBlockKeys);
    parts.take(scale, rows);
    parts.take(state, rows);
    parts.take(k_panels, panels ? int64_t{kBlockKeys} * ldq : 0);
    parts.take(v_panels, panels ? int64_t{kValuePanel} * (ldo / kPanelWidth) : 0);
    return parts.used();
  }
};

template <class Format>
class Attention {
 public:
  Attention(const PagedProblem& p, const Plan& plan, Item item, void* scratch)
      : p_(p), plan_(plan), tile_(plan.tiles[static_cast<size_t>(item.tile)]), format_(p), score_(p, tile_),
        heads_(tile_.head_end - tile_.head_begin), rows_per_head_(tile_.rows_per_head(p.group)),
        padded_rows_(tile_.padded_rows_per_head(p.group)) {
    const int rows = padded_rows_ * heads_;
    scratch_.carve(static_cast<char*>(scratch), p, rows, tile_.stream ? rows : padded_rows_, !tile_.stream);
    const int64_t split = tile_.split_len();
    const int64_t begin = (tile_.key_begin / split + item.split) * split;
    key_begin_ = std::max(begin, tile_.key_begin);
    key_end_ = std::min(begin + split, tile_.key_end);
  }

  void run() {
    load_queries();
    if (tile_.stream) {
      stream();
    } else {
      panels();
    }
  }

  // Rows of a tile are ordered (kv head, token, head of the group).
  void write_partial(const Partials& to, int split) const {
    const int rows = tile_.rows(p_.group);
    const int64_t first = tile_.partial + int64_t{split} * rows;
    for (int r = 0; r < rows; ++r) {
      const int from = row_of(r);
      std::copy_n(scratch_.out + from * scratch_.ldo, p_.head_dim_v, to.out + (first + r) * to.out_stride);
      to.max[first + r] = scratch_.state[from].max;
      to.sum[first + r] = scratch_.state[from].sum;
    }
  }

  void write_output() const {
    for (int r = 0; r < tile_.rows(p_.group); ++r) {
      finish(p_, tile_, r, scratch_.out + row_of(r) * scratch_.ldo, scratch_.state[row_of(r)]);
    }
  }

  static void finish(const PagedProblem& p, const Tile& tile, int r, float* acc, SoftmaxRow row) {
    Format::finish_output(p, acc);
    const int per_head = tile.rows_per_head(p.group);
    const int64_t token = tile.token + r % per_head / p.group;
    const int64_t head = int64_t{tile.head_begin + r / per_head} * p.group + r % p.group;
    const float* sink = p.sinks ? p.sinks + head * p.sinks_stride : nullptr;
    finish_row(acc, row, sink, p.head_dim_v, p.dtype,
               element_at(p.out.data, token * p.out.token_stride + head * p.out.head_stride, p.dtype),
               p.lse + token * p.lse_token_stride + head * p.lse_head_stride);
  }

 private:
  // Where row r of the tile is in the scratch memory: there each head's rows are padded to whole register blocks.
  int row_of(int r) const { return r / rows_per_head_ * padded_rows_ + r % rows_per_head_; }

  void load_queries() {
    if (padded_rows_ != rows_per_head_) {
      std::fill(scratch_.q, scratch_.q + scratch_.rows * scratch_.ldq, 0.0f);
      std::fill(scratch_.s, scratch_.s + padded_rows_ * kBlockKeys, 0.0f);
    }
    for (int h = tile_.head_begin; h < tile_.head_end; ++h) {
      int r = (h - tile_.head_begin) * padded_rows_;
      for (int t = 0; t < tile_.num_tokens; ++t) {
        for (int g = 0; g < p_.group; ++g, ++r) {
          const int64_t from = (tile_.token + t) * p_.q.token_stride + (int64_t{h} * p_.group + g) * p_.q.head_stride;
          float* to = scratch_.q + r * scratch_.ldq;
          unpack_row(element_at(p_.q.data, from, p_.dtype), p_.dtype, p_.head_dim, to);
          format_.prepare_query(to, tile_.stream);
        }
      }
    }
    std::fill(scratch_.out, scratch_.out + scratch_.rows * scratch_.ldo, 0.0f);
    std::fill(scratch_.scale, scratch_.scale + scratch_.rows, 1.0f);
    std::fill(scratch_.state, scratch_.state + scratch_.rows, SoftmaxRow{});
  }

  PageListSchedule schedule(int block_keys) const {
    return PageListSchedule(p_.list.pages(tile_.request, tile_.head_begin), p_.list.index_stride, p_.page_size,
                            key_begin_, key_end_, block_keys);
  }

  // Scores s to weights for heads [first, first + count) of the tile, whose rows start at `row`. Returns whether some row
  // does not see some key.
  bool weigh(const KeyBlock& block, int first, int count, int row, float* s) {
    const int vectors = (block.count + W - 1) / W, rows = count * rows_per_head_;
    const bool plain = score_.plain(block);
    for (int h = 0; h < count && !plain; ++h) {
      score_.apply(block, tile_.head_begin + first + h, s + h * rows_per_head_ * kBlockKeys);
    }
    const int unseen =
        softmax_rows(s, rows, vectors, plain ? p_.softmax_scale : 1.0f, scratch_.state + row, scratch_.scale + row);
    return unseen > rows * (vectors * W - block.count);
  }

  // Few rows: memory-bound. K of a block is multiplied while its V is fetched, then V while the next K is fetched.
  void stream() {
    PageListSchedule keys = schedule(plan_.block_keys);
    KeyBlock blocks[2];
    typename Format::Rows rows[2];
    const void* fetch[kBlockKeys];
    bool more = keys.next(blocks[0]);
    if (more) format_.locate(blocks[0], rows[0]);
    for (int i = 0; more; i ^= 1) {
      const KeyBlock& block = blocks[i];
      Prefetcher ahead_v = format_.prefetch_v(rows[i], fetch, tile_.head_begin, tile_.head_end, rows_per_head_);
      format_.scores(rows[i], tile_.head_begin, heads_, scratch_.q, scratch_.ldq, rows_per_head_, scratch_.s, ahead_v);
      more = keys.next(blocks[i ^ 1]);
      if (more) {
        format_.locate(blocks[i ^ 1], rows[i ^ 1]);
      } else {
        rows[i ^ 1].count = 0;
      }
      Prefetcher ahead_k = format_.prefetch_k(rows[i ^ 1], fetch, tile_.head_begin, tile_.head_end, rows_per_head_);
      const bool hidden = weigh(block, 0, heads_, 0, scratch_.s);
      for (int h = 0; h < heads_; ++h) {
        const int head = tile_.head_begin + h, row = h * rows_per_head_;
        const float* s = scratch_.s + row * kBlockKeys;
        if (hidden && !format_.finite_v(rows[i], head)) {
          accumulate_seen([&](int j, int d) { return format_.v_element(rows[i], head, j, d); }, rows[i].count, s,
                          scratch_.scale + row, rows_per_head_, p_.head_dim_v, scratch_.out + row * scratch_.ldo,
                          scratch_.ldo);
        } else {
          format_.accumulate(rows[i], head, s, scratch_.scale + row, rows_per_head_, scratch_.out + row * scratch_.ldo,
                             scratch_.ldo, ahead_k);
        }
      }
    }
  }

  // Many rows of each kv head: arithmetic-bound. A head's block is unpacked once and serves all its rows.
  void panels() {
    PageListSchedule keys = schedule(kBlockKeys);
    KeyBlock block;
    typename Format::Rows rows;
    while (keys.next(block)) {
      format_.locate(block, rows);
      for (int h = 0; h < heads_; ++h) panel(block, rows, h);
    }
  }

  // One block of head `h` of the tile.
  void panel(const KeyBlock& block, const typename Format::Rows& rows, int h) {
    const int row = h * padded_rows_;
    const PanelRows to = {scratch_.q + row * scratch_.ldq,
                          scratch_.s,
                          scratch_.out + row * scratch_.ldo,
                          scratch_.scale + row,
                          scratch_.ldq,
                          scratch_.ldo,
                          rows_per_head_,
                          padded_rows_,
                          p_.head_dim,
                          p_.head_dim_v,
                          scratch_.k_panels,
                          scratch_.v_panels};
    attend_panel(format_, rows, tile_.head_begin + h, to, [&](float* s) { return weigh(block, h, 1, row, s); });
  }

  const PagedProblem& p_;
  const Plan& plan_;
  const Tile& tile_;
  Format format_;
  Score score_;
  int heads_, rows_per_head_, padded_rows_;
  int64_t key_begin_ = 0, key_end_ = 0;
  Scratch scratch_ = {};
};

// One item: a tile's output, or one split's part of it.
template <class Attention>
void attend_item(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials) {
  Attention attention(problem, plan, item, scratch);
  attention.run();
  if (plan.tiles[static_cast<size_t>(item.tile)].num_splits > 1) {
    attention.write_partial(partials, item.split);
  } else {
    attention.write_output();
  }
}

// A tile's output from its splits', in their order.
template <class Attention>
void merge_item(const PagedProblem& problem, const Tile& tile, const Partials& partials) {
  const int rows = tile.rows(problem.group);
  alignas(64) float acc[padded(256)];
  for (int r = 0; r < rows; ++r) {
    SoftmaxRow merged;
    for (int s = 0; s < tile.num_splits; ++s) {
      const float max = partials.max[tile.partial + int64_t{s} * rows + r];
      merged.max = max > merged.max ? max : merged.max;
    }
    std::fill(acc, acc + padded(problem.head_dim_v), 0.0f);
    for (int s = 0; s < tile.num_splits; ++s) {
      const int64_t row = tile.partial + int64_t{s} * rows + r;
      if (partials.max[row] == -kInf) continue;
      const float factor = std::exp(partials.max[row] - merged.max);
      merged.sum += partials.sum[row] * factor;
      const float* part = partials.out + row * partials.out_stride;
      for (int d = 0; d < problem.head_dim_v; d += W) store(load(acc + d) + load(part + d) * factor, acc + d);
    }
    Attention::finish(problem, tile, r, acc, merged);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
