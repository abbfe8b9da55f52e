// The attention engine: one item (a split of a tile) = schedule x format x score x reduction.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/engine/dense.h"
#include "cpu/engine/gemm.h"
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
  float* s;           // [rows, kBlockKeys] scores, then weights
  float* scale;       // [rows] factor of the running output in this block
  SoftmaxRow* state;  // [rows]
  float* k_panels;    // [kBlockKeys / kPanelWidth][head_dim][kPanelWidth], panel tiles only
  float* v_panels;    // [ldo / kPanelWidth][kValuePanel]: [kBlockKeys][kPanelWidth] and a gap, panel tiles only

  // Lays the parts out from base (null: only counts). Returns the bytes used.
  int64_t carve(char* base, const PagedProblem& p, int num_rows, bool panels) {
    ldq = padded(p.head_dim);
    ldo = padded(p.head_dim_v);
    rows = (num_rows + kBlockRows - 1) / kBlockRows * kBlockRows;
    int64_t used = 0;
    const auto take = [&](auto*& part, int64_t count) {
      using Part = std::remove_reference_t<decltype(*part)>;
      if (base != nullptr) part = reinterpret_cast<Part*>(base + used);
      used += (count * int64_t{sizeof(Part)} + 63) / 64 * 64;
    };
    take(q, int64_t{rows} * ldq);
    take(out, int64_t{rows} * ldo);
    take(s, int64_t{rows} * kBlockKeys);
    take(scale, rows);
    take(state, rows);
    take(k_panels, panels ? int64_t{kBlockKeys} * ldq : 0);
    take(v_panels, panels ? int64_t{kValuePanel} * (ldo / kPanelWidth) : 0);
    return used;
  }
};

template <class T, class Format>
class Attention {
 public:
  Attention(const PagedProblem& p, const Plan& plan, Item item, void* scratch)
      : p_(p), plan_(plan), tile_(plan.tiles[static_cast<size_t>(item.tile)]), format_(p), score_(p, tile_),
        heads_(tile_.head_end - tile_.head_begin), rows_per_head_(tile_.rows_per_head(p.group)) {
    scratch_.carve(static_cast<char*>(scratch), p, tile_.rows(p.group), !tile_.stream);
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
      std::copy_n(scratch_.out + r * scratch_.ldo, p_.head_dim_v, to.out + (first + r) * to.out_stride);
      to.max[first + r] = scratch_.state[r].max;
      to.sum[first + r] = scratch_.state[r].sum;
    }
  }

  void write_output() const {
    for (int r = 0; r < tile_.rows(p_.group); ++r) {
      finish(p_, tile_, r, scratch_.out + r * scratch_.ldo, scratch_.state[r]);
    }
  }

  static void finish(const PagedProblem& p, const Tile& tile, int r, const float* acc, SoftmaxRow row) {
    const int per_head = tile.rows_per_head(p.group);
    const int64_t token = tile.token + r % per_head / p.group;
    const int64_t head = int64_t{tile.head_begin + r / per_head} * p.group + r % p.group;
    const float* sink = p.sinks ? p.sinks + head * p.sinks_stride : nullptr;
    finish_row(acc, row, sink, p.head_dim_v,
               static_cast<T*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride,
               p.lse + token * p.lse_token_stride + head * p.lse_head_stride);
  }

 private:
  void load_queries() {
    const int rows = tile_.rows(p_.group);
    int r = 0;
    for (int h = tile_.head_begin; h < tile_.head_end; ++h) {
      for (int t = 0; t < tile_.num_tokens; ++t) {
        for (int g = 0; g < p_.group; ++g, ++r) {
          const T* q = static_cast<const T*>(p_.q.data) + (tile_.token + t) * p_.q.token_stride +
                       (int64_t{h} * p_.group + g) * p_.q.head_stride;
          float* to = scratch_.q + r * scratch_.ldq;
          int d = 0;
          for (; d + W <= p_.head_dim; d += W) store(load(q + d), to + d);
          if (d < p_.head_dim) store(load_half(q + d), to + d);
        }
      }
    }
    // Rows that only fill the last register block.
    std::fill(scratch_.q + rows * scratch_.ldq, scratch_.q + scratch_.rows * scratch_.ldq, 0.0f);
    std::fill(scratch_.s + rows * kBlockKeys, scratch_.s + scratch_.rows * kBlockKeys, 0.0f);
    std::fill(scratch_.out, scratch_.out + scratch_.rows * scratch_.ldo, 0.0f);
    std::fill(scratch_.scale, scratch_.scale + scratch_.rows, 1.0f);
    std::fill(scratch_.state, scratch_.state + scratch_.rows, SoftmaxRow{});
  }

  PageListSchedule schedule(int block_keys) const {
    return PageListSchedule(p_.list.pages(tile_.request, tile_.head_begin), p_.list.index_stride, p_.page_size,
                            key_begin_, key_end_, block_keys);
  }

  // Scores to weights for one kv head, whose rows start at `row`. Returns whether some row does not see some key.
  bool weigh(const KeyBlock& block, int head, int row) {
    float* s = scratch_.s + row * kBlockKeys;
    score_.apply(block, head, s);
    const int vectors = (block.count + W - 1) / W;
    int unseen = 0;
    for (int r = 0; r < rows_per_head_; ++r) {
      scratch_.scale[row + r] = softmax_update(s + r * kBlockKeys, vectors, scratch_.state[row + r], unseen);
    }
    return unseen > rows_per_head_ * (vectors * W - block.count);
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
      Prefetcher ahead_v = format_.prefetch_v(rows[i], fetch, tile_.head_begin, tile_.head_end);
      format_.scores(rows[i], tile_.head_begin, heads_, scratch_.q, scratch_.ldq, rows_per_head_, scratch_.s, ahead_v);
      more = keys.next(blocks[i ^ 1]);
      if (more) {
        format_.locate(blocks[i ^ 1], rows[i ^ 1]);
      } else {
        rows[i ^ 1].count = 0;
      }
      Prefetcher ahead_k = format_.prefetch_k(rows[i ^ 1], fetch, tile_.head_begin, tile_.head_end, rows_per_head_);
      for (int h = 0; h < heads_; ++h) {
        const int head = tile_.head_begin + h, row = h * rows_per_head_;
        const bool hidden = weigh(block, head, row);
        if (hidden && !format_.finite_v(rows[i], head)) {
          accumulate_seen(rows[i], head, row);
        } else {
          format_.accumulate(rows[i], head, scratch_.s + row * kBlockKeys, scratch_.scale + row, rows_per_head_,
                             scratch_.out + row * scratch_.ldo, scratch_.ldo, ahead_k);
        }
      }
    }
  }

  // Many rows of one kv head: arithmetic-bound. A block is unpacked once and serves all rows.
  void panels() {
    const int head = tile_.head_begin;
    PageListSchedule keys = schedule(kBlockKeys);
    KeyBlock block;
    typename Format::Rows rows;
    const int v_panels = (p_.head_dim_v + kPanelWidth - 1) / kPanelWidth;
    while (keys.next(block)) {
      format_.locate(block, rows);
      format_.pack_k(rows, head, scratch_.k_panels);
      multiply_scores(scratch_.q, scratch_.ldq, scratch_.rows, scratch_.k_panels,
                      (block.count + kPanelWidth - 1) / kPanelWidth, p_.head_dim, scratch_.s, kBlockKeys);
      const bool hidden = weigh(block, head, 0);
      if (hidden && !format_.finite_v(rows, head)) {
        accumulate_seen(rows, head, 0);
        continue;
      }
      format_.pack_v(rows, head, scratch_.v_panels);
      multiply_values(scratch_.s, scratch_.rows, scratch_.v_panels, v_panels, block.count, scratch_.out, scratch_.ldo,
                      scratch_.scale);
    }
  }

  // The rare block in which V holds NaN or infinities and some row does not see some key: 0 * NaN must not enter a row that
  // does not read that key.
  void accumulate_seen(const typename Format::Rows& rows, int head, int first_row) {
    for (int r = first_row; r < first_row + rows_per_head_; ++r) {
      float* out = scratch_.out + r * scratch_.ldo;
      const float* weights = scratch_.s + r * kBlockKeys;
      for (int d = 0; d < p_.head_dim_v; ++d) {
        float acc = out[d] * scratch_.scale[r];
        for (int j = 0; j < rows.count; ++j) {
          if (!std::signbit(weights[j])) acc += weights[j] * format_.v_element(rows, head, j, d);
        }
        out[d] = acc;
      }
    }
  }

  const PagedProblem& p_;
  const Plan& plan_;
  const Tile& tile_;
  Format format_;
  Score score_;
  int heads_, rows_per_head_;
  int64_t key_begin_ = 0, key_end_ = 0;
  Scratch scratch_ = {};
};

}  // namespace kvk::cpu::KVK_LEVEL
