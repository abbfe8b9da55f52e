// The sum that normalised linear attention and its gradient are made of, at one instruction-set level: over rows x, y, z of
// the tokens of one head of one sequence, with j the tokens that token i sees,
//   out_i = S^T x_i + sum over j of (x_i . y_j) z_j                     S the state before: [dim of x, dim of z]
// A pass goes over groups of tokens. A block of more than half a chunk is a group: the state takes up all its keys, then its
// queries read the state. Smaller ones share a chunk of C tokens, whose scores are masked by block:
//   A = X Y^T where j is seen       out = A Z + X S      S += Y^T Z
// All a chunk needs stays in L2. The denominators take no matrix: a running sum of rows, read by a dot product.
#pragma once

#include "cpu/lightning_chunk.h"
#include "kvk/device/linear_params.h"
#include "kvk/linear.h"

namespace kvk::cpu::KVK_LEVEL {

inline float dot(const float* a, const float* b, int n) {
  V sum = 0.0f;
  for (int d = 0; d < n; d += W) sum += load(a + d) * load(b + d);
  float sums[4];
  sum_lanes(sum, sum, sum, sum, sums);
  return sums[0];
}

// The tokens of one head of one sequence, in order or from the last to the first, in any dtype.
class TokenRows {
 public:
  TokenRows(const Tensor& t, const LightningItem& item, bool reverse)
      : dtype_(t.dtype), count_(item.num_tokens), step_((reverse ? -1 : 1) * t.stride[1] * element_size(t.dtype)) {
    const int64_t first = item.token + (reverse ? item.num_tokens - 1 : 0);
    data_ = t.ptr<char>() +
            (item.batch * t.stride[0] + first * t.stride[1] + item.head * t.stride[2]) * element_size(t.dtype);
  }

  // n elements from `column` on as floats; the rest of the last vector is 0.
  void load(int64_t i, int column, int n, float* to) const {
    by_dtype(dtype_,
             [&](auto type) { load_row(reinterpret_cast<const decltype(type)*>(data_ + i * step_) + column, n, to); });
  }
  // Row i is a short run of memory, which no hardware fetches ahead: a chunk is time enough.
  void prefetch(int64_t i, int column, int n) const {
    if (i >= count_) return;
    const int64_t size = element_size(dtype_);
    const char* row = data_ + i * step_ + column * size;
    for (int64_t at = 0; at < n * size; at += 64) prefetch_l2(row + at);
  }
  // Rows of a chunk; the next chunk's are fetched meanwhile.
  void load(int64_t first, int rows, int column, int n, float* to, int ld) const {
    for (int r = 0; r < rows; ++r) {
      load(first + r, column, n, to + r * ld);
      prefetch(first + kChunk + r, column, n);
    }
  }
  void store(const float* from, int64_t i, int column, int n) const {
    by_dtype(dtype_,
             [&](auto type) { store_row(from, n, reinterpret_cast<decltype(type)*>(data_ + i * step_) + column); });
  }

 private:
  DType dtype_;
  int64_t count_, step_;
  char* data_;
};

// A float a token of a [B, T, H] tensor.
struct TokenFloats : HeadRows<float> {
  using HeadRows::HeadRows;
  float& operator[](int64_t i) const { return *row(i); }
};

using Group = device::LinearGroup;
using Blocks = device::LinearBlocks;
static_assert(Group::kChunk == kChunk);

inline Blocks blocks_of(const LinearAttentionArgs& args, int64_t tokens, bool reverse) {
  return Blocks(args.causal, args.block_size, tokens, reverse);
}
// A block of more than half a chunk; of fewer tokens, scores cost less.
inline bool through_state(const Group& group) { return group.one_block() && group.count > kChunk / 2; }

struct LinearScratch {
  int ld;
  float *x, *y, *z, *out;  // [C, dim]
  float* yt;               // [dim, C]
  float* a;                // [C, C]
  float* s;                // [dim, dim]
  float* sums;             // [C, Dk]: what each block of a group sees
  float* vectors;          // [5, dim]
  int64_t floats;

  LinearScratch(int dk, int dv, float* memory) : ld(pitch(std::max(dk, dv))) {
    ScratchCarver carve(memory);
    const int most = padded(std::max(dk, dv));
    for (float** m : {&x, &y, &z, &out, &sums}) *m = carve.take(kChunk, ld);
    yt = carve.take(most, kTokenPitch);
    a = carve.take(kChunk, kTokenPitch);
    s = carve.take(most, ld);
    vectors = carve.take(5, ld);
    floats = carve.used();
  }
  float* vector(int i) const { return vectors + i * ld; }
};

// The running sum of rows that stands under the fraction, as each block of a group sees it. Summed by chunks: one chain of
// adds over a long sequence would lose digits.
class VectorState {
 public:
  VectorState(const TokenRows& rows, int dim, const LinearScratch& m)
      : rows_(rows), dim_(dim), m_(m), total_(m.vector(0)), part_(m.vector(1)), row_(m.vector(2)) {}

  // factors: of each row; null: 1.
  void start(const float* initial, const float* factors) {
    std::fill_n(total_, m_.ld, 0.0f);
    std::fill_n(part_, m_.ld, 0.0f);
    if (initial != nullptr) load_row(initial, dim_, total_);
    factors_ = factors;
  }
  void add(const Group& group) {
    for (int64_t i = 0, summed = 0; i < group.count; ++i) {
      rows_.load(group.first + i, 0, dim_, row_);
      rows_.prefetch(group.first + i + kChunk, 0, dim_);
      const V factor = factors_ == nullptr ? 1.0f : factors_[group.first + i];
      for (int d = 0; d < dim_; d += W) store(load(part_ + d) + load(row_ + d) * factor, part_ + d);
      const bool last = i + 1 == group.count;
      if (last || group.block(i + 1) != group.block(i)) {
        float* seen = m_.sums + group.block(i) * m_.ld;
        for (int d = 0; d < dim_; d += W) store(load(total_ + d) + load(part_ + d), seen + d);
      }
      if (++summed % kChunk != 0 && !last) continue;
      for (int d = 0; d < dim_; d += W) {
        store(load(total_ + d) + load(part_ + d), total_ + d);
        store(V(0.0f), part_ + d);
      }
    }
  }
  // What token i of the group sees.
  const float* seen(const Group& group, int64_t i) const { return m_.sums + group.block(i) * m_.ld; }
  const float* total() const { return total_; }

 private:
  const TokenRows& rows_;
  int dim_;
  const LinearScratch& m_;
  float *total_, *part_, *row_;
  const float* factors_ = nullptr;
};

// Rows and a factor for each: null: `factor` for all.
struct Operand {
  const TokenRows& rows;
  int dim;
  int column = 0;
  float factor = 1.0f;
  const float* factors = nullptr;

  void load(int64_t first, int tokens, float* to, int ld) const {
    rows.load(first, tokens, column, dim, to, ld);
    if (factors == nullptr && factor == 1.0f) return;
    for (int i = 0; i < tokens; ++i) scale_row(to + i * ld, dim, factors == nullptr ? factor : factors[first + i]);
  }
};

// What happens at the start of a group and to each finished row of a pass.
class Results {
 public:
  virtual void begin(const Group&) {}
  virtual void row(const Group& group, int64_t i, float* sums) = 0;  // token i of the group

 protected:
  ~Results() = default;
};

// One pass; m.s holds the state before it and then the one after.
inline void sum_over_seen(const Operand& x, const Operand& y, const Operand& z, const Blocks& blocks,
                          const LinearScratch& m, Results& results) {
  const int ld = m.ld;
  const auto add_to_state = [&](int tokens) {
    multiply<Into::kAdd, true>(m.y, ld, m.z, ld, x.dim, z.dim, tokens, m.s, ld);
  };
  Group group;
  for (int64_t first = 0; first < blocks.tokens; first += group.count) {
    group = blocks.at(first);
    results.begin(group);
    const auto each_chunk = [&](const auto& call) {
      for (int64_t at = 0; at < group.count; at += kChunk) {
        call(at, static_cast<int>(std::min<int64_t>(kChunk, group.count - at)));
      }
    };
    const auto finish = [&](int64_t at, int tokens) {
      for (int i = 0; i < tokens; ++i) results.row(group, at + i, m.out + i * ld);
    };
    if (through_state(group)) {
      each_chunk([&](int64_t at, int tokens) {
        y.load(first + at, tokens, m.y, ld);
        z.load(first + at, tokens, m.z, ld);
        add_to_state(tokens);
      });
      each_chunk([&](int64_t at, int tokens) {
        x.load(first + at, tokens, m.x, ld);
        multiply<Into::kSet>(m.x, ld, m.s, ld, tokens, z.dim, x.dim, m.out, ld);
        finish(at, tokens);
      });
      continue;
    }
    const int tokens = static_cast<int>(group.count);
    x.load(first, tokens, m.x, ld);
    y.load(first, tokens, m.y, ld);
    z.load(first, tokens, m.z, ld);
    transpose(m.y, ld, tokens, x.dim, m.yt, kTokenPitch);
    const auto end = [&](int i) { return group.end(i); };
    scores(m.x, ld, m.yt, tokens, x.dim, m.a, end, [](int, int, V s) { return s; });
    weigh_values(m.a, m.z, ld, tokens, z.dim, m.out, end);
    multiply<Into::kAdd>(m.x, ld, m.s, ld, tokens, z.dim, x.dim, m.out, ld);
    finish(0, tokens);
    add_to_state(tokens);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
