// Gradients of attention over ordinary tensors, from out and lse that the caller gives (they may be those of a merge of
// several branches: P = exp(S - lse) are then the probabilities among all keys, and each branch's gradient is exact).
//
//   P = exp(scale QK' + bias - lse)   delta = rowsum(dO * O) - dlse   dS = P * (dO V' - delta)
//   dQ = scale dS K                   dK = scale dS' Q                dV = P' dO
//
// One class for two passes, each writing only what belongs to its tile, so nothing is added by two workers: rows are
// queries and columns keys for dQ, the other way round for dK and dV. Seven matrix products in all, two of them done
// twice (S and dO V'), where a pass that scatters needs five and an order of its own to be deterministic.
#pragma once

#include "cpu/engine/grid.h"

namespace kvk::cpu::KVK_LEVEL {

template <class T, bool kRowsAreQueries>
class GridGradient {
 public:
  static int64_t scratch_bytes(const GridProblem& p, int max_rows) {
    GridGradient empty(p);
    return empty.carve(nullptr, max_rows);
  }

  GridGradient(const GridProblem& p, GridSchedule& schedule, int64_t index, void* scratch) : GridGradient(p) {
    schedule_ = &schedule;
    schedule.begin(index, tile_);
    rows_ = tile_.num_heads * tile_.tokens.count;
    carve(static_cast<char*>(scratch), rows_);
  }

  void run() {
    const int head = kRowsAreQueries ? tile_.head_begin : tile_.kv_head;
    load_tile<T>(row_a(), tile_, head, p_.head_dim, padded_, a_, lda_);
    load_tile<T>(row_b(), tile_, head, p_.head_dim_v, padded_, b_, ldb_);
    std::fill(s_, s_ + padded_ * kBlockKeys, 0.0f);
    std::fill(t_, t_ + padded_ * kBlockKeys, 0.0f);
    std::fill(sum_a_, sum_a_ + padded_ * lda_, 0.0f);
    if (!kRowsAreQueries) std::fill(sum_b_, sum_b_ + padded_ * ldb_, 0.0f);
    std::fill(one_, one_ + padded_, 1.0f);
    if (kRowsAreQueries) {
      for (int h = 0; h < tile_.num_heads; ++h) {
        load_state(tile_.tokens, tile_.head_begin + h, lse_ + h * tile_.tokens.count, delta_ + h * tile_.tokens.count);
      }
    }
    while (schedule_->next(columns_)) step();
    if (kRowsAreQueries) {
      write(p_.dq, tile_.head_begin, sum_a_, lda_, p_.head_dim, p_.softmax_scale);
    } else {
      write(p_.dk, tile_.kv_head, sum_a_, lda_, p_.head_dim, p_.softmax_scale);
      write(p_.dv, tile_.kv_head, sum_b_, ldb_, p_.head_dim_v, 1.0f);
    }
  }

 private:
  explicit GridGradient(const GridProblem& p) : p_(p), lda_(padded(p.head_dim)), ldb_(padded(p.head_dim_v)) {}

  // A: what S is the product of, B: what dO V' is the product of.
  const GridView& row_a() const { return kRowsAreQueries ? p_.q : p_.k; }
  const GridView& row_b() const { return kRowsAreQueries ? p_.grad_out : p_.v; }
  const GridView& column_a() const { return kRowsAreQueries ? p_.k : p_.q; }
  const GridView& column_b() const { return kRowsAreQueries ? p_.v : p_.grad_out; }

  int64_t carve(char* base, int num_rows) {
    padded_ = padded_rows(num_rows);
    Carver parts(base);
    parts.take(a_, int64_t{padded_} * lda_);
    parts.take(b_, int64_t{padded_} * ldb_);
    parts.take(s_, int64_t{padded_} * kBlockKeys);
    parts.take(t_, int64_t{padded_} * kBlockKeys);
    parts.take(sum_a_, int64_t{padded_} * lda_);
    parts.take(sum_b_, kRowsAreQueries ? 0 : int64_t{padded_} * ldb_);
    parts.take(one_, padded_);
    const int queries = kRowsAreQueries ? padded_ : kBlockKeys;
    parts.take(lse_, queries);
    parts.take(delta_, queries);
    parts.take(transposed_, int64_t{kBlockKeys} * std::max(lda_, ldb_));
    parts.take(straight_, int64_t{kValuePanel} * (std::max(lda_, ldb_) / kPanelWidth));
    return parts.used();
  }

  // lse and delta of one head's queries. A query that saw no key anywhere (-inf, or +inf as FlashAttention-2 has it) gets
  // +inf, which no key's score reaches.
  template <class Tokens>
  void load_state(const Tokens& tokens, int head, float* lse, float* delta) const {
    const T* out[kGridTileTokens];
    const float* grad_lse[kGridTileTokens];
    locate_rows<T>(p_.out, tokens, out);
    locate_rows<float>(p_.grad_lse, tokens, grad_lse);
    for_tokens<const float>(p_.lse, tokens, [&](int t, const float* at) {
      const float x = at[head * p_.lse.head_stride];
      lse[t] = x == -kInf ? kInf : x;
    });
    for_tokens<const T>(p_.grad_out, tokens, [&](int t, const T* at) {
      delta[t] = dot_rows(at + head * p_.grad_out.head_stride, out[t] + head * p_.out.head_stride, p_.head_dim_v) -
                 grad_lse[t][head * p_.grad_lse.head_stride];
    });
  }

  static float dot_rows(const T* x, const T* y, int dim) {
    V acc = 0.0f;
    int d = 0;
    for (; d + W <= dim; d += W) acc += load(x + d) * load(y + d);
    if (d < dim) acc += load_half(x + d) * load_half(y + d);
    float sums[4];
    sum_lanes(acc, acc, acc, acc, sums);
    return sums[0];
  }

  void step() {
    const int count = columns_.tokens.count, panels = (count + kPanelWidth - 1) / kPanelWidth;
    const T* a[kBlockKeys];
    const T* b[kBlockKeys];
    locate_rows<T>(column_a(), columns_.tokens, a);
    locate_rows<T>(column_b(), columns_.tokens, b);
    const int64_t at_a = columns_.head * column_a().head_stride, at_b = columns_.head * column_b().head_stride;
    if (!kRowsAreQueries) load_state(columns_.tokens, columns_.head, lse_, delta_);
    pack_transposed(a, count, at_a, p_.head_dim, transposed_);
    multiply_scores(a_, lda_, padded_, transposed_, panels, p_.head_dim, s_, kBlockKeys);
    pack_transposed(b, count, at_b, p_.head_dim_v, transposed_);
    multiply_scores(b_, ldb_, padded_, transposed_, panels, p_.head_dim_v, t_, kBlockKeys);
    const bool hidden = differentiate(count);
    accumulate(t_, a, count, at_a, p_.head_dim, hidden, sum_a_, lda_);
    if (!kRowsAreQueries) accumulate(s_, b, count, at_b, p_.head_dim_v, hidden, sum_b_, ldb_);
  }

  // Scores s to P and products t to dS, in place; both -0.0 where a row does not see a column. Returns whether there is
  // such a place.
  bool differentiate(int count) {
    const int vectors = (count + W - 1) / W;
    const uint64_t all = ~uint64_t{0} >> (kBlockKeys - count);
    alignas(64) uint32_t lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = uint32_t{1} << i;
    const VU32 lane(lanes, stdx::element_aligned);
    bool hidden = false;
    for (int h = 0, r = 0; h < tile_.num_heads; ++h) {
      for (int t = 0; t < tile_.tokens.count; ++t, ++r) {
        uint64_t seen = columns_.masked ? columns_.seen[t] & all : all;
        hidden |= seen != all;
        float* s = s_ + r * kBlockKeys;
        float* ds = t_ + r * kBlockKeys;
        for (int i = 0; i < vectors; ++i, seen >>= W) {
          const V lse = kRowsAreQueries ? V(lse_[r]) : load(lse_ + i * W);
          const V delta = kRowsAreQueries ? V(delta_[r]) : load(delta_ + i * W);
          V x = load(s + i * W) * p_.softmax_scale;
          if (columns_.biased) x += load(columns_.bias + i * W);
          // A bias of -inf hides a key too; and a query that saw nothing (lse +inf here) is seen by nobody.
          const auto none = x == -kInf || lse == kInf;
          const VU32 unseen_by_mask = lane & VU32(~static_cast<uint32_t>(seen));
          x -= lse;
          stdx::where(x > 88.0f, x) = 88.0f;  // exp() goes no further; an lse that is the keys' own keeps x <= 0
          V weight = exp(x), grad = weight * (load(ds + i * W) - delta) + 0.0f;
          stdx::where(none, weight) = V(-0.0f);
          stdx::where(none, grad) = V(-0.0f);
          hidden |= stdx::any_of(none);
          store(unsee(weight, unseen_by_mask), s + i * W);
          store(unsee(grad, unseen_by_mask), ds + i * W);
        }
      }
    }
    return hidden;
  }

  static V unsee(V x, VU32 unseen) {
    VU32 bits = bit_cast<VU32>(x);
    stdx::where(unseen != 0u, bits) = 0x80000000u;
    return bit_cast<V>(bits);
  }

  // sum += weights . columns.
  void accumulate(const float* weights, const T* const* columns, int count, int64_t first, int dim, bool hidden,
                  float* sum, int ld) {
    if (hidden && !finite_rows(columns, count, first, dim)) {
      return accumulate_seen([&](int j, int d) { return to_float(columns[j][first + d]); }, count, weights, one_, rows_,
                             dim, sum, ld);
    }
    pack_rows(columns, count, first, dim, straight_);
    multiply_values(weights, padded_, straight_, (dim + kPanelWidth - 1) / kPanelWidth, count, sum, ld, one_);
  }

  void write(const GridView& to, int head, const float* sum, int ld, int dim, float factor) const {
    for_tokens<T>(to, tile_.tokens, [&](int t, T* at) {
      for (int h = 0; h < tile_.num_heads; ++h) {
        const float* from = sum + (h * tile_.tokens.count + t) * ld;
        T* row = at + (head + h) * to.head_stride;
        int d = 0;
        for (; d + W <= dim; d += W) store(load(from + d) * factor, row + d);
        if (d < dim) store_partial(load(from + d) * factor, row + d, dim - d);
      }
    });
  }

  const GridProblem& p_;
  GridSchedule* schedule_ = nullptr;
  GridTile tile_;
  GridColumns columns_;
  int lda_, ldb_, rows_ = 0, padded_ = 0;
  float *a_ = nullptr, *b_ = nullptr;          // rows [padded, ld]
  float *s_ = nullptr, *t_ = nullptr;          // [padded, kBlockKeys]: scores and dO V', then P and dS
  float *sum_a_ = nullptr, *sum_b_ = nullptr;  // gradients of the rows
  float* one_ = nullptr;                       // [padded] factor of the sums
  float *lse_ = nullptr, *delta_ = nullptr;    // of the queries, be they rows or columns
  float *transposed_ = nullptr, *straight_ = nullptr;
};

}  // namespace kvk::cpu::KVK_LEVEL
