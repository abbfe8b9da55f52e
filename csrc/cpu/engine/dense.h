// Format: dense pages of f32, bf16 or f16. A format offers two ways to its keys:
//   stream  scores() and accumulate() multiply a few rows straight with the stored elements;
//   panels  pack_k() and pack_v() unpack a block into fp32 for the matrix product of many rows.
#pragma once

#include <algorithm>

#include "core/paged_problem.h"
#include "cpu/engine/rows.h"
#include "cpu/engine/schedule.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// Walks rows of memory line by line, so that fetching the next piece of the cache is spread evenly over the arithmetic on
// the present one: a burst of fetches would fill the queue of misses and stop the arithmetic.
class Prefetcher {
 public:
  // Rows of span bytes each: `lines` lines at every `every`th step.
  Prefetcher(const void* const* rows, int count, int64_t span, int lines, int every = 1)
      : row_(rows), end_(rows + count), span_(span), lines_(lines), every_(every), wait_(every) {}

  // The same rows in at most `steps` steps.
  static Prefetcher spread(const void* const* rows, int count, int64_t span, int64_t steps) {
    const int64_t lines = std::max<int64_t>(1, count * ((span + 63) / 64));
    steps = std::max<int64_t>(1, steps);
    return Prefetcher(rows, count, span, static_cast<int>((lines + steps - 1) / steps),
                      static_cast<int>(std::max<int64_t>(1, steps / lines)));
  }

  void step() {
    if (--wait_ > 0) return;
    wait_ = every_;
    for (int64_t left = lines_; left > 0 && row_ != end_;) {
      const char* line = static_cast<const char*>(*row_) + at_;
      const int64_t lines = std::min(left, (span_ - at_ + 63) / 64);
      for (int64_t i = 0; i < lines; ++i) prefetch_l2(line + 64 * i);
      left -= lines;
      at_ += 64 * lines;
      if (at_ >= span_) {
        at_ = 0;
        ++row_;
      }
    }
  }

 private:
  const void* const* row_;
  const void* const* end_;
  int64_t span_, at_ = 0;
  int lines_, every_, wait_;
};

// s[r * lds + j] = q_r . k_j for Rows rows and Keys keys; Rows * Keys is a multiple of 4.
// q in the order of load_pair().
template <class T, int Rows, int Keys>
[[gnu::always_inline]] inline void dot_tile(const float* q, int ldq, const T* const* keys, int64_t head, int head_dim,
                                            float* s, int lds, Prefetcher& ahead) {
  V acc[Rows * Keys];
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Keys; ++i) acc[i] = 0.0f;
  const auto multiply = [&](int d, const V* k) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const V x = in_register(load(q + r * ldq + d));
#pragma GCC unroll 16
      for (int j = 0; j < Keys; ++j) acc[r * Keys + j] += x * k[j];
    }
  };
  int d = 0;
  for (; d + 2 * W <= head_dim; d += 2 * W) {
    ahead.step();
    V a[Keys], b[Keys];
#pragma GCC unroll 16
    for (int j = 0; j < Keys; ++j) load_pair(keys[j] + head + d, a[j], b[j]);
    multiply(d, a);
    multiply(d + W, b);
  }
  V k[Keys];
  if (d + W <= head_dim) {
#pragma GCC unroll 16
    for (int j = 0; j < Keys; ++j) k[j] = load(keys[j] + head + d);
    multiply(d, k);
    d += W;
  }
  if constexpr (W > 8) {
    if (d < head_dim) {
#pragma GCC unroll 16
      for (int j = 0; j < Keys; ++j) k[j] = load_half(keys[j] + head + d);
      multiply(d, k);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Keys; i += 4) {
    float sums[4];
    sum_lanes(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums);
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) s[(i + e) / Keys * lds + (i + e) % Keys] = sums[e];
  }
}

// What one vector or pair of V is loaded from: whole pairs, one vector, or the last 8 elements.
enum class Column { kPairs, kVector, kHalf };

// out[r][c..c + Vecs * W) = out * scale[r] + sum over keys of p[r][j] * v_j[c..).
// Not inlined, where GCC would spill the sums.
template <class T, int Rows, int Vecs, Column kColumn>
[[gnu::noinline]] void accumulate_tile(const float* p, int ldp, const float* scale, const T* const* keys,
                                       int64_t column, int count, float* out, int ldo, Prefetcher& ahead) {
  static_assert(kColumn == Column::kPairs ? Vecs % 2 == 0 : Vecs == 1);
  V acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < Vecs; ++e) acc[r][e] = 0.0f;
  }
  const auto add_key = [&](int j) __attribute__((always_inline)) {
    const T* from = keys[j] + column;
    V v[Vecs];
    if constexpr (kColumn == Column::kPairs) {
#pragma GCC unroll 16
      for (int e = 0; e < Vecs; e += 2) load_pair(from + e * W, v[e], v[e + 1]);
    } else {
      v[0] = kColumn == Column::kHalf ? load_half(from) : load(from);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const V x = p[r * ldp + j];
#pragma GCC unroll 16
      for (int e = 0; e < Vecs; ++e) acc[r][e] += x * v[e];
    }
  };
  for (int j = 0; j < count; ++j) {
    ahead.step();
    add_key(j);
  }
  // What was there joins at the end: started with, it would stretch the chain of roundings over all blocks.
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < Vecs; ++e) {
      if (kColumn == Column::kPairs && e % 2 == 0) from_pair<T>(acc[r][e], acc[r][e + 1]);
      float* to = out + r * ldo + e * W;
      store(load(to) * scale[r] + acc[r][e], to);
    }
  }
}

// The stream half of dense rows, wherever they lie.
template <class T>
class DenseStream : public RowFormat<T> {
 public:
  using typename RowFormat<T>::Rows;
  using RowFormat<T>::RowFormat;

  // Makes a row of q what scores() takes (stream), or pack_k()'s product.
  void prepare_query(float* q, bool stream) const {
    if (stream) into_pairs<T>(q, head_dim_);
  }
  // The order of memory again, of a stream.
  void natural_query(float* q) const { out_of_pairs<T>(q, head_dim_); }

  // Steps of the prefetcher in scores() and accumulate() for num_rows rows of one head.
  int64_t score_steps(int keys, int num_rows) const {
    return int64_t{(keys + kKeyStep - 1) / kKeyStep} * dot_steps(num_rows);
  }
  int64_t accumulate_steps(int keys, int num_rows) const {
    const int width = (num_rows == 1 ? kVecs<1> : kVecs<4>)*W;
    return int64_t{(head_dim_v_ + width - 1) / width} * ((num_rows + 3) / 4) * keys;
  }

  // s[r][j] = q_r . k_j for `heads` kv heads from head `begin`, num_rows rows each (q and s: [heads * num_rows, ld]).
  // Keys outermost: NHD pools are then read in the order they lie.
  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher& ahead) const;

  // out[r] = out[r] * scale[r] + sum over keys of p[r][j] * v_j, for one kv head.
  void accumulate(const Rows& rows, int head, const float* p, const float* scale, int num_rows, float* out, int ldo,
                  Prefetcher& ahead) const;

 private:
  static constexpr int kKeyStep = 8;

  // Register blocks: 8 accumulators hide the latency of the multiply-add; 16 where there are 32 registers.
  template <int R>
  static constexpr int kKeys = R == 1           ? 8
                               : kManyRegisters ? 4
                               : R == 4         ? 2
                                                : 4;
  template <int R>
  static constexpr int kVecs = kManyRegisters ? 4
                               : R == 1       ? 4
                                              : 2;

  // Not inlined, where GCC would spill the sums.
  template <int R>
  [[gnu::noinline]] void dot_rows(const float* q, int ldq, const T* const* keys, int64_t head, float* s,
                                  Prefetcher& ahead) const {
    for (int j = 0; j < kKeyStep; j += kKeys<R>) {
      dot_tile<T, R, kKeys<R>>(q, ldq, keys + j, head, head_dim_, s + j, kBlockKeys, ahead);
    }
  }

  // Steps of the prefetcher that dot_rows() makes for num_rows rows of one head and kKeyStep keys.
  int dot_steps(int num_rows) const {
    const int rest = num_rows % 4;
    const int of_rest = rest == 0   ? 0
                        : rest == 1 ? kKeyStep / kKeys<1>
                        : rest == 2 ? kKeyStep / kKeys<2>
                                    : kKeyStep / kKeys<3>;
    return std::max(1, (num_rows / 4 * (kKeyStep / kKeys<4>)+of_rest) * (head_dim_ / (2 * W)));
  }

  template <int R>
  void accumulate_rows(const Rows& rows, int head, const float* p, const float* scale, float* out, int ldo,
                       Prefetcher& ahead) const {
    const int64_t first = head * v_head_stride_;
    int c = 0;
    for (; c + kVecs<R> * W <= head_dim_v_; c += kVecs<R> * W) {
      accumulate_tile<T, R, kVecs<R>, Column::kPairs>(p, kBlockKeys, scale, rows.v, first + c, rows.count, out + c, ldo,
                                                      ahead);
    }
    for (; c + W <= head_dim_v_; c += W) {
      accumulate_tile<T, R, 1, Column::kVector>(p, kBlockKeys, scale, rows.v, first + c, rows.count, out + c, ldo,
                                                ahead);
    }
    if constexpr (W > 8) {
      if (c < head_dim_v_) {
        accumulate_tile<T, R, 1, Column::kHalf>(p, kBlockKeys, scale, rows.v, first + c, rows.count, out + c, ldo,
                                                ahead);
      }
    }
  }

 protected:
  using RowFormat<T>::k_head_stride_, RowFormat<T>::v_head_stride_, RowFormat<T>::head_dim_, RowFormat<T>::head_dim_v_;
};

template <class T>
void DenseStream<T>::scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
                            Prefetcher& ahead) const {
  for (int j = 0; j < rows.count; j += kKeyStep) {
    const T* keys[kKeyStep];
    // The last step repeats its last key: its scores land in the padding of s.
    for (int e = 0; e < kKeyStep; ++e) keys[e] = rows.k[std::min(j + e, rows.count - 1)];
    for (int h = 0; h < heads; ++h) {
      const int64_t head = (begin + h) * k_head_stride_;
      const float* qh = q + static_cast<int64_t>(h) * num_rows * ldq;
      float* sh = s + static_cast<int64_t>(h) * num_rows * kBlockKeys + j;
      for (int r = 0; r < num_rows; r += 4) {
        with_rows(num_rows - r,
                  [&](auto n) { dot_rows<n()>(qh + r * ldq, ldq, keys, head, sh + r * kBlockKeys, ahead); });
      }
    }
  }
}

template <class T>
void DenseStream<T>::accumulate(const Rows& rows, int head, const float* p, const float* scale, int num_rows,
                                float* out, int ldo, Prefetcher& ahead) const {
  for (int r = 0; r < num_rows; r += 4) {
    with_rows(num_rows - r, [&](auto n) {
      accumulate_rows<n()>(rows, head, p + r * kBlockKeys, scale + r, out + r * ldo, ldo, ahead);
    });
  }
}

// Compiled in paged_kernels.cc, for the formats of records too.
extern template class DenseStream<float>;
extern template class DenseStream<bf16>;
extern template class DenseStream<f16>;

template <class T>
class DensePages : public DenseStream<T> {
 public:
  using typename DenseStream<T>::Rows;

  // A format may keep rows in another basis: it then changes queries on their way in and outputs on their way out.
  static void finish_output(const PagedProblem&, float*) {}

  explicit DensePages(const PagedProblem& p)
      : DenseStream<T>(p.k.head_stride, p.v.head_stride, p.head_dim, p.head_dim_v), k_(p.k), v_(p.v) {}

  void locate(const KeyBlock& block, Rows& rows) const {
    rows.count = block.count;
    for (int i = 0; i < block.num_runs; ++i) {
      const Run& run = block.runs[i];
      const T* k = base(k_, run);
      const T* v = base(v_, run);
      for (int j = 0; j < run.count; ++j) {
        rows.k[run.begin + j] = k + j * k_.token_stride;
        rows.v[run.begin + j] = v + j * v_.token_stride;
      }
    }
  }

  // `count` keys of one page.
  Rows rows(const void* k, const void* v, int count) const {
    Rows rows;
    rows.count = count;
    for (int j = 0; j < count; ++j) {
      rows.k[j] = static_cast<const T*>(k) + j * k_.token_stride;
      rows.v[j] = static_cast<const T*>(v) + j * v_.token_stride;
    }
    return rows;
  }

  // What to fetch of a located block for kv heads [begin, end): whole rows where the heads lie side by side. V is fetched
  // by scores(), the next K by accumulate().
  Prefetcher prefetch_v(const Rows& rows, const void** scratch, int begin, int end, int num_rows) const {
    return prefetch(rows.v, rows.count, v_, this->head_dim_v_, scratch, begin, end,
                    (end - begin) * this->score_steps(rows.count, num_rows));
  }
  Prefetcher prefetch_k(const Rows& rows, const void** scratch, int begin, int end, int num_rows) const {
    return prefetch(rows.k, rows.count, k_, this->head_dim_, scratch, begin, end,
                    (end - begin) * this->accumulate_steps(rows.count, num_rows));
  }

 private:
  static const T* base(const PoolView& pool, const Run& run) {
    return static_cast<const T*>(pool.data) + run.page * pool.page_stride + run.offset * pool.token_stride;
  }

  static Prefetcher prefetch(const T* const* rows, int count, const PoolView& pool, int head_dim, const void** scratch,
                             int begin, int end, int64_t steps) {
    for (int j = 0; j < count; ++j) scratch[j] = rows[j] + begin * pool.head_stride;
    const int64_t span = ((end - begin - 1) * pool.head_stride + head_dim) * int64_t{sizeof(T)};
    return Prefetcher::spread(scratch, count, span, steps);
  }

  PoolView k_, v_;
};

}  // namespace kvk::cpu::KVK_LEVEL
