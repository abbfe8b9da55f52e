// What chunks of lightning attention and of normalised linear attention have in common: scores, the products with the state and
// with the values, and the way of a result to memory. What a token weighs is a parameter, `weights` below:
//   each_block(call)          call(i, j) for the blocks of 16 x 16 tokens that have scores, in turns of the warps
//   reads(to, from)           whether some of 16 tokens from `to` on sees some of 16 from `from` on
//   sees(to, from)            whether a token does
//   weigh(s, to, from)        a score from the product of two rows
//   past(token)               the weight of the state's product
//   whole(), source(token)    the weights of a state and of a token in the state after the chunk
#pragma once

#include "kvk/device/lightning_state.cuh"

namespace kvk::device {

template <class Config>
class ChunkPass {
 protected:
  using T = typename Config::T;
  static constexpr int kChunk = LightningShape::kChunk, kColumns = LightningShape::kColumns;
  static constexpr int kDim = Config::kDim, kPitch = Config::kPitch, kStages = Config::kStages;
  static constexpr int kScorePitch = LightningShape::kScorePitch, kValuePitch = LightningShape::kValuePitch;
  static constexpr int kScoreParts = Config::kScoreParts, kInputParts = Config::kInputParts;
  static constexpr int kKeys = Config::kShape.key_elements(), kValues = Config::kShape.value_elements();
  static constexpr int kScores = Config::kShape.score_elements();
  using State = WarpState<T, kDim, kPitch>;
  using Output = typename State::Columns;  // out^T, [16, C]
  using Packed = uint32_t[kChunk / 8][2];  // its elements in pairs

  KVK_DEVICE ChunkPass(const LightningParams& p, SmemCarver carve)
      : p_(p), q_(carve.take<T>(size_t(kStages) * kKeys)), k_(carve.take<T>(size_t(kStages) * kKeys)),
        v_(carve.take<T>(size_t(kStages) * kValues)), scores_(carve.take<bf16>(size_t(kScoreParts) * kScores)),
        decays_(carve.take<float>(2 * LightningShape::kDecayFloats)), item_(*carve.take<LightningItem>(1)) {}

  // Not kept: a register more than it costs to ask again.
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE static int warp() { return threadIdx.x / 32; }
  KVK_DEVICE int column() const { return item_.column + warp() * 16; }  // this warp's first one

  // Rows of a chunk, those before token `end`.
  KVK_DEVICE void load_keys(T* to, const SequenceView& from, int64_t first, int64_t end) const {
    copy_chunk<kDim, kPitch>(to, item_.rows<const T>(from), from.token_stride, first, end, p_.dk);
  }
  KVK_DEVICE void load_values(T* to, int64_t first, int64_t end) const {
    copy_chunk<kColumns, kValuePitch>(to, item_.rows<const T>(p_.v) + item_.column, p_.v.token_stride, first, end,
                                      p_.dv - item_.column);
  }

  // Of the blocks that have any, scores.
  template <class Weights>
  KVK_DEVICE void scores(const T* q, const T* k, const Weights& weights) const {
    weights.each_block([&](int i, int j) {
      float s[2][4] = {};
      multiply_rows<kDim, kPitch>(q, k, i, j, s);
      KVK_UNROLL
      for (int n = 0; n < 2; ++n) {
        KVK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int to = i + half * 8 + lane() / 4, from = j + n * 8 + lane() % 4 * 2;
          float weighted[2];
          KVK_UNROLL
          for (int e = 0; e < 2; ++e) {
            weighted[e] = weights.sees(to, from + e) ? weights.weigh(s[n][half * 2 + e], to, from + e) : 0.0f;
          }
          uint32_t parts[kScoreParts];
          split_bf16(weighted[0], weighted[1], parts);
          KVK_UNROLL
          for (int part = 0; part < kScoreParts; ++part) {
            store_words<1>(scores_ + part * kScores + to * kScorePitch + from, {{parts[part]}});
          }
        }
      }
    });
  }

  // out^T = S^T Q^T, weighted.
  template <class Weights>
  KVK_DEVICE void add_past(const T* q, const Weights& weights, Output& out) const {
    state_.template read<kScoreParts>(q, out);
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) out[n][i] *= weights.past(n * 8 + lane() % 4 * 2 + i % 2);
    }
  }

  // out^T += V^T A^T. A weight of 0 times NaN would reach the tokens before it: values that are not finite are left to
  // add_nonfinite.
  template <class Weights>
  KVK_DEVICE void add_values(const T* v, const Weights& weights, Output& out) const {
    bool finite = true;
    KVK_NO_UNROLL
    for (int step = 0; step < kChunk / 16; ++step) {
      uint32_t words[4], a[kInputParts][4];
      State::load_values(v, step, words);
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t kept = finite_only<T>(words[i]);
        finite &= kept == words[i];
        words[i] = kept;
      }
      split_words<T>(words, a);
      KVK_UNROLL
      for (int n = 0; n < kChunk / 8; n += 2) {
        if (!weights.reads(n * 8, step * 16)) continue;
        uint32_t b[kScoreParts][4];
        KVK_UNROLL
        for (int part = 0; part < kScoreParts; ++part) {
          ptx::ldmatrix(b[part], scores_ + part * kScores + (n * 8 + lane() % 8 + lane() / 16 * 8) * kScorePitch +
                                     (step * 2 + lane() / 8 % 2) * 8);
        }
        mma_parts<kScoreParts>(out[n], a, b, 0);
        mma_parts<kScoreParts>(out[n + 1], a, b, 2);
      }
    }
    if (!__all_sync(0xffffffffu, finite)) add_nonfinite(v, weights, out);
  }

  // NaN and infinities among the values, to the tokens that read them.
  template <class Weights>
  KVK_DEVICE void add_nonfinite(const T* v, const Weights& weights, Output& out) const {
    KVK_NO_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const T left = v[j * kValuePitch + lane() / 4], right = v[j * kValuePitch + lane() / 4 + 8];
      KVK_UNROLL
      for (int n = 0; n < kChunk / 8; ++n) {
        KVK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + lane() % 4 * 2 + i % 2;
          const T x = i < 2 ? left : right;
          if (!weights.sees(token, j) || is_finite(x)) continue;
          float weight = 0.0f;
          KVK_UNROLL
          for (int part = 0; part < kScoreParts; ++part) {
            weight += to_float(scores_[part * kScores + token * kScorePitch + j]);
          }
          out[n][i] += weight * to_float(x);
        }
      }
    }
  }

  // out from its parts; the warps' scores must be there.
  template <class Weights>
  KVK_DEVICE void attend(const T* q, const T* v, const Weights& weights, Output& out) const {
    add_past(q, weights, out);
    __syncthreads();  // the scores of all warps are there
    add_values(v, weights, out);
  }
  KVK_DEVICE static void pack(const Output& sums, Packed& out) {
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 2; ++i) out[n][i] = pack2<T>(sums[n][2 * i], sums[n][2 * i + 1]);
    }
  }

  // By way of the place of the warp's values, so that memory is written in pieces of 32 bytes.
  KVK_DEVICE void write(T* v, int64_t first, int64_t end, const Packed& out) const {
    __syncwarp();  // all lanes have read the values
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = out[n][i / 2];
        v[(n * 8 + lane() % 4 * 2 + i % 2) * kValuePitch + lane() / 4 + i / 2 * 8] = T{uint16_t(word >> i % 2 * 16)};
      }
    }
    __syncwarp();  // the rows are there for all lanes
    T* to = item_.rows<T>(p_.out) + column();
    const int columns = p_.dv - column();
    KVK_UNROLL
    for (int i = lane(); i < kChunk * 2; i += 32) {
      const int row = i / 2, column = i % 2 * 8;
      if (first + row < end && column < columns) {
        store_words(to + (first + row) * p_.out.token_stride + column, load_words<4>(v + row * kValuePitch + column));
      }
    }
  }

  template <class Weights>
  KVK_DEVICE void update(const T* v, const T* k, const Weights& weights) {
    state_.add(v, k, weights.whole(), [&](int token) { return weights.source(token); });
  }

  // Tokens of no sequence.
  KVK_DEVICE void clear(const LightningItem& item) const {
    T* to = item.rows<T>(p_.out) + item.column;
    const int64_t pieces = kColumns / 8;
    for (int64_t i = threadIdx.x; i < item.tokens * pieces; i += LightningShape::kThreads) {
      const int64_t row = i / pieces, column = i % pieces * 8;
      if (column < p_.dv - item.column) store_words<4>(to + row * p_.out.token_stride + column, {});
    }
  }

  const LightningParams& p_;
  T *q_, *k_, *v_;
  bf16* scores_;
  float* decays_;
  LightningItem& item_;
  State state_;
};

}  // namespace kvk::device
