// What a chunk of lightning attention is made of, at one instruction-set level: rows in fp32, the decays between its tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "cpu/engine/gemm.h"
#include "cpu/lightning_plan.h"
#include "cpu/simd.h"
#include "kvk/lightning.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kChunk = kLightningChunk;
static_assert(kChunk % kPad == 0 && kLightningColumns % kPanelWidth == 0 && kPad % kPanelWidth == 0);

// Floats from row to row of a matrix of n columns: an odd number of cache lines, so that a column's rows spread over all sets.
constexpr int pitch(int n) { return padded(n) + 16; }
inline constexpr int kTokenPitch = pitch(kChunk);

// Hands out matrices of a worker's scratch memory; run over nothing it counts.
class ScratchCarver {
 public:
  explicit ScratchCarver(float* memory) : memory_(memory) {}
  // A row more than asked for: products of an odd number of rows write it.
  float* take(int64_t rows, int64_t row_pitch) {
    float* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (rows + 1) * row_pitch;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

// One head of one sequence of a [B, T, H, D] tensor.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  HeadRows(const Tensor& t, const LightningItem& item)
      : data(t.ptr<T>() + item.batch * t.stride[0] + item.token * t.stride[1] + item.head * t.stride[2]),
        stride(t.stride[1]) {}
  T* row(int64_t token) const { return data + token * stride; }
};

// One head's state of one sequence of a [N, H, Dk, Dv] tensor.
struct StateRows {
  float* data = nullptr;
  int64_t stride = 0;

  StateRows() = default;
  StateRows(const Tensor& t, int64_t sequence, int64_t head)
      : data(t.ptr<float>() + sequence * t.stride[0] + head * t.stride[1]), stride(t.stride[2]) {}
};

// n elements to floats; the rest of the last vector is 0.
template <class T>
inline void load_row(const T* from, int n, float* to) {
  int d = 0;
  for (; d + W <= n; d += W) store(load(from + d), to + d);
  if (d < n) store(load_partial(from + d, n - d), to + d);
}

template <class T>
inline void store_row(const float* from, int n, T* to) {
  int d = 0;
  for (; d + W <= n; d += W) store(load(from + d), to + d);
  if (d < n) store_partial(load(from + d), to + d, n - d);
}

// Rows of a chunk; the next chunk's are fetched meanwhile, because a row of one head is a short run of memory.
template <class T>
inline void load_rows(const HeadRows<const T>& from, int64_t first, int64_t end, int rows, int begin, int columns,
                      float* to, int ld) {
  for (int r = 0; r < rows; ++r) {
    load_row(from.row(first + r) + begin, columns, to + r * ld);
    if (first + kChunk + r < end) {
      const char* next = reinterpret_cast<const char*>(from.row(first + kChunk + r) + begin);
      for (int64_t at = 0; at < columns * int64_t{sizeof(T)}; at += 64) prefetch_l2(next + at);
    }
  }
}

inline void scale_row(float* row, int n, float factor) {
  for (int d = 0; d < n; d += W) store(load(row + d) * factor, row + d);
}

inline bool is_finite(const float* x, int rows, int columns, int ld) {
  V sum = 0.0f;  // 0 as long as all are finite
  for (int r = 0; r < rows; ++r) {
    for (int d = 0; d < columns; d += W) {
      const V value = load(x + r * ld + d);
      sum += value - value;
    }
  }
  return stdx::all_of(sum == 0.0f);
}

// to[c][r] = from[r][c], for rows and columns padded to 8; what lies in the padding is moved along.
inline void transpose(const float* from, int from_ld, int rows, int columns, float* to, int to_ld) {
  for (int r = 0; r < rows; r += 8) {
    for (int c = 0; c < columns; c += 8) {
      const float* block[8];
      for (int i = 0; i < 8; ++i) block[i] = from + (r + i) * from_ld + c;
      transpose_8x8(block, to + c * to_ld + r, to_ld);
    }
  }
}

inline V lane_numbers() {
  return V([](int i) { return static_cast<float>(i); });
}

// a[i][j] = weigh(i, j, q_i . k_j) for j < end(i), of W columns at a time, 0 for the others that a block of rows goes over.
// end never decreases: token i of the chunk sees its tokens up to it.
template <class End, class Weigh>
inline void scores(const float* q, int ldq, const float* kt, int tokens, int depth, float* a, End end, Weigh weigh) {
  const V lanes = lane_numbers();
  for (int i = 0; i < tokens; i += kBlockRows) {
    const int rows = std::min(kBlockRows, tokens - i), columns = end(i + rows - 1);
    float* block = a + i * kTokenPitch;
    multiply<Into::kSet>(q + i * ldq, ldq, kt, kTokenPitch, rows, columns, depth, block, kTokenPitch);
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < columns; j += W) {
        V x = weigh(i + r, j, load(block + r * kTokenPitch + j));
        stdx::where(lanes >= static_cast<float>(end(i + r) - j), x) = 0.0f;
        store(x, block + r * kTokenPitch + j);
      }
    }
  }
}

// out_i = sum over j < end(i) of a[i][j] v_j
template <class End>
inline void weigh_values(const float* a, const float* v, int ldv, int tokens, int dv, float* out, End end) {
  if (is_finite(v, tokens, dv, ldv)) {
    for (int i = 0; i < tokens; i += kBlockRows) {
      const int rows = std::min(kBlockRows, tokens - i);
      multiply<Into::kSet>(a + i * kTokenPitch, kTokenPitch, v, ldv, rows, dv, end(i + rows - 1), out + i * ldv, ldv);
    }
    return;
  }
  // A weight of 0 times NaN would reach the rows before it: each row takes its own tokens alone, in the same order.
  for (int i = 0; i < tokens; ++i) {
    for (int p = 0; p < dv; p += kPanelWidth) {
      multiply_block<Into::kSet, false, 1>(a + i * kTokenPitch, kTokenPitch, v + p, ldv, end(i), out + i * ldv + p, ldv,
                                           nullptr);
    }
  }
}

// The decays of a chunk: with G the running sum of the log decays from its start, exp(G_i - G_j) between tokens j <= i,
// exp(G_i) since the start, exp(G_last - G_j) to the end. Only differences that are <= 0 are ever taken to exp, so nothing
// overflows, however strong the decay. Sums are kept in two floats: at G = -3000 one has an error of 1e-4, and so its exp.
class ChunkDecay {
 public:
  // The item's head of log_decay [H] | [B, T, H]; none: no decay.
  ChunkDecay(const std::optional<Tensor>& log_decay, const LightningItem& item) {
    if (log_decay && log_decay->ndim == 3) {
      stride_ = log_decay->stride[1];
      per_token_ = log_decay->ptr<const float>() + item.batch * log_decay->stride[0] + item.token * stride_ +
                   item.head * log_decay->stride[2];
      return;
    }
    const double log = log_decay ? clamped(log_decay->ptr<const float>()[item.head * log_decay->stride[0]]) : 0.0;
    for (int n = 0; n < kChunk; ++n) {
      down_[n] = power(log, kChunk - 1 - n);
      up_[kChunk + n] = power(log, n);
    }
    up_[2 * kChunk] = power(log, kChunk);
  }

  // Chunk of `tokens` tokens from token `first` of the item.
  void start(int64_t first, int tokens) {
    if (per_token_ == nullptr) {
      const float* powers = up_ + kChunk;
      for (int i = 0; i < kChunk; ++i) {
        since_start_[i] = i < tokens ? powers[i + 1] : 0.0f;
        to_end_[i] = i < tokens ? powers[tokens - 1 - i] : 0.0f;
      }
      whole_ = powers[tokens];
      return;
    }
    double sum = 0.0, sums[kChunk];
    for (int i = 0; i < tokens; ++i) {
      sum += clamped(per_token_[(first + i) * stride_]);
      sums[i] = sum;
      high_[i] = static_cast<float>(sum);
      low_[i] = static_cast<float>(sum - static_cast<double>(high_[i]));
    }
    for (int i = tokens; i < kChunk; ++i) high_[i] = low_[i] = 0.0f;
    float exponents[kChunk];
    const auto to_exp = [&](float* out) {
      for (int i = 0; i < kChunk; i += W) store(exp(load(exponents + i)), out + i);
    };
    for (int i = 0; i < kChunk; ++i) exponents[i] = i < tokens ? static_cast<float>(sums[i]) : -kInf;
    to_exp(since_start_);
    for (int i = 0; i < kChunk; ++i) exponents[i] = i < tokens ? static_cast<float>(sum - sums[i]) : -kInf;
    to_exp(to_end_);
    whole_ = since_start_[tokens - 1];
  }

  // Lane l: the decay from token j + l to token i. Lanes past i hold anything.
  V to_token(int i, int j) const {
    if (per_token_ == nullptr) return load(down_ + kChunk - 1 - i + j);
    return exp((high_[i] - load(high_ + j)) + (low_[i] - load(low_ + j)));
  }
  // Lane l: the decay from token j to token i + l. Lanes before j hold anything.
  V from_token(int j, int i) const {
    if (per_token_ == nullptr) return load(up_ + kChunk + i - j);
    return exp((load(high_ + i) - high_[j]) + (load(low_ + i) - low_[j]));
  }
  const float* since_start() const { return since_start_; }
  const float* to_end() const { return to_end_; }
  float whole() const { return whole_; }

 private:
  // exp(-200) is 0 in fp32 as is exp(-inf), of which no differences could be taken. NaN stays.
  static double clamped(float log) { return log < -200.0f ? -200.0 : static_cast<double>(log); }
  // As exp of a vector: 0 rather than a subnormal number.
  static float power(double log, int n) {
    const double x = log * n;
    return x < -87.3 ? 0.0f : static_cast<float>(std::exp(x));
  }

  const float* per_token_ = nullptr;
  int64_t stride_ = 0;
  float down_[2 * kChunk] = {};       // of a decay per head: its powers kChunk - 1 .. 0, then 0 for tokens to come
  float up_[2 * kChunk + 1] = {};     // as many 0, then its powers 0 .. kChunk
  float high_[kChunk], low_[kChunk];  // of decays per token: G
  float since_start_[kChunk], to_end_[kChunk], whole_ = 1.0f;
};

// call(x) with x of that dtype.
template <class Call>
void by_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::bf16: return call(bf16{});
    case DType::f16: return call(f16{});
    default: return call(0.0f);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
