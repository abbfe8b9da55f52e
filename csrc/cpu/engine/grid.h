// The attention engine over ordinary tensors: one tile of query rows against the columns of a schedule.
#pragma once

#include "cpu/engine/panel.h"
#include "cpu/engine/rows.h"
#include "cpu/engine/score.h"
#include "cpu/engine/softmax.h"
#include "cpu/grid.h"

namespace kvk::cpu::KVK_LEVEL {

static_assert(kGridColumns == kBlockKeys);

inline int padded_rows(int rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }

// f(index of the token, its element 0 at head 0) for every token.
template <class T, class Tokens, class F>
inline void for_tokens(const GridView& view, const Tokens& tokens, F&& f) {
  for (int i = 0; i < tokens.num_runs; ++i) {
    const GridRun& run = tokens.runs[i];
    T* at = view.token<T>(run.at);
    const int64_t step = run.step * view.stride[kGridDims - 1];
    for (int j = 0; j < run.count; ++j) f(run.begin + j, at + j * step);
  }
}

// Pointers to the tokens' rows, at head 0.
template <class T, class Tokens>
inline void locate_rows(const GridView& view, const Tokens& tokens, const T** rows) {
  for_tokens<const T>(view, tokens, [&](int j, const T* at) { rows[j] = at; });
}

// Rows (head, token) of a tile into fp32, and zeros into the padding.
template <class T>
inline void load_tile(const GridView& view, const GridTile& tile, int first_head, int dim, int padded, float* to,
                      int ld) {
  for_tokens<const T>(view, tile.tokens, [&](int t, const T* at) {
    for (int h = 0; h < tile.num_heads; ++h) {
      unpack_row(at + (first_head + h) * view.head_stride, dim, to + (h * tile.tokens.count + t) * ld);
    }
  });
  const int rows = tile.num_heads * tile.tokens.count;
  std::fill(to + rows * ld, to + padded * ld, 0.0f);
}

// Format: keys and values anywhere on the grid.
template <class T>
class DenseGrid : public RowFormat<T> {
 public:
  using Rows = typename RowFormat<T>::Rows;

  explicit DenseGrid(const GridProblem& p)
      : RowFormat<T>(p.k.head_stride, p.v.head_stride, p.head_dim, p.head_dim_v), k_(p.k), v_(p.v) {}

  void locate(const GridColumns& columns, Rows& rows) const {
    rows.count = columns.tokens.count;
    locate_rows<T>(k_, columns.tokens, rows.k);
    locate_rows<T>(v_, columns.tokens, rows.v);
  }

 private:
  const GridView &k_, &v_;
};

template <class T>
class GridAttention {
 public:
  static int64_t scratch_bytes(const GridProblem& p, int max_rows) {
    PanelRows rows = {};
    SoftmaxRow* state;
    return carve(nullptr, p, max_rows, rows, state);
  }

  GridAttention(const GridProblem& p, GridSchedule& schedule, int64_t index, void* scratch)
      : p_(p), schedule_(schedule), format_(p) {
    schedule.begin(index, tile_);
    const int rows = tile_.num_heads * tile_.tokens.count;
    carve(static_cast<char*>(scratch), p, rows, rows_, state_);
  }

  void run() {
    load_tile<T>(p_.q, tile_, tile_.head_begin, p_.head_dim, rows_.padded, rows_.q, rows_.ldq);
    std::fill(rows_.s, rows_.s + rows_.padded * kBlockKeys, 0.0f);
    std::fill(rows_.out, rows_.out + rows_.padded * rows_.ldo, 0.0f);
    std::fill(rows_.scale, rows_.scale + rows_.padded, 1.0f);
    std::fill(state_, state_ + rows_.padded, SoftmaxRow{});
    typename DenseGrid<T>::Rows keys;
    while (schedule_.next(columns_)) {
      format_.locate(columns_, keys);
      attend_panel(format_, keys, columns_.head, rows_, [&](float* s) { return weigh(s); });
    }
    for (int h = 0; h < tile_.num_heads; ++h) finish_head(h);
  }

 private:
  static int64_t carve(char* base, const GridProblem& p, int num_rows, PanelRows& rows, SoftmaxRow*& state) {
    rows.ldq = padded(p.head_dim);
    rows.ldo = padded(p.head_dim_v);
    rows.rows = num_rows;
    rows.padded = padded_rows(num_rows);
    rows.head_dim = p.head_dim;
    rows.head_dim_v = p.head_dim_v;
    Carver parts(base);
    parts.take(rows.q, int64_t{rows.padded} * rows.ldq);
    parts.take(rows.out, int64_t{rows.padded} * rows.ldo);
    parts.take(rows.s, int64_t{rows.padded} * kBlockKeys);
    parts.take(rows.scale, rows.padded);
    parts.take(state, rows.padded);
    parts.take(rows.k_panels, int64_t{kBlockKeys} * rows.ldq);
    parts.take(rows.v_panels, int64_t{kValuePanel} * (rows.ldo / kPanelWidth));
    return parts.used();
  }

  // q.k to weights; whether some row does not see some key.
  bool weigh(float* s) {
    const int count = columns_.tokens.count, vectors = (count + W - 1) / W, rest = vectors * W - count;
    float factor = p_.softmax_scale;
    if (columns_.biased || factor <= 0.0f) {  // a score of -inf must stay one, so only a positive factor can wait
      for (int r = 0; r < rows_.rows; ++r) scale_scores(s + r * kBlockKeys, vectors);
      factor = 1.0f;
    }
    if (columns_.masked || rest > 0) {
      const uint64_t all = ~uint64_t{0} >> (kBlockKeys - count);
      for (int h = 0, r = 0; h < tile_.num_heads; ++h) {
        for (int t = 0; t < tile_.tokens.count; ++t, ++r) {
          hide_unseen(columns_.masked ? columns_.seen[t] & all : all, vectors, s + r * kBlockKeys);
        }
      }
    }
    const int unseen = softmax_rows(s, rows_.rows, vectors, factor, state_, rows_.scale);
    return unseen > rows_.rows * rest;
  }

  void scale_scores(float* row, int vectors) const {
    for (int i = 0; i < vectors; ++i) {
      V x = load(row + i * W) * p_.softmax_scale;
      if (columns_.biased) x += load(columns_.bias + i * W);
      store(x, row + i * W);
    }
  }

  void finish_head(int h) const {
    const int head = tile_.head_begin + h, first = h * tile_.tokens.count;
    float* lse[kGridTileTokens];
    for_tokens<float>(p_.lse, tile_.tokens, [&](int t, float* at) { lse[t] = at + head * p_.lse.head_stride; });
    for_tokens<T>(p_.out, tile_.tokens, [&](int t, T* at) {
      finish_row(rows_.out + (first + t) * rows_.ldo, state_[first + t], nullptr, p_.head_dim_v, p_.dtype,
                 at + head * p_.out.head_stride, lse[t]);
    });
  }

  const GridProblem& p_;
  GridSchedule& schedule_;
  DenseGrid<T> format_;
  GridTile tile_;
  GridColumns columns_;
  PanelRows rows_ = {};
  SoftmaxRow* state_ = nullptr;
};

}  // namespace kvk::cpu::KVK_LEVEL
