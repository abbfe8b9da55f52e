// Lightning attention forward, chunk by chunk (Lightning Attention-2's two parts; G as in lightning_chunk.cuh):
//   A = scale * Q K^T .* exp(G_i - G_j) for j <= i      out = A V + scale * exp(G_i) Q S
//   S = exp(G_last) S + K^T (exp(G_last - G_j) V)
//
// FLOPs a token and head: C (Dk + Dv) + 4 Dk Dv with C = 64. The update of S takes decayed values as three bf16 parts, 8 Dk Dv
// in all, so that the state is as exact as fp32; each block of columns makes the scores anew. Bytes: q, k, v, out once. At
// 128 x 128 in bf16 that is some 160 FLOPs a byte of mma.sync, of which an H100 does about 180 in the time of a byte: bound by
// both alike, where there are heads and sequences enough. Products of f16 take three to five times those of bf16: S, A and
// decayed values may leave the range of f16, so that all factors are taken as sums of bf16.
// The gradients of q, k and v are this kernel in other roles (csrc/cuda/lightning.cc), the last two from the end of a sequence.
// Tile: a block takes one head of one sequence and 64 columns of v, one chunk after another; a warp 16 of the columns and S^T
// of them, [16, Dk], in registers as an mma accumulator, which is also the first factor of S^T Q^T. Scores are shared: warps
// take turns at their 10 blocks of 16 x 16. Pipeline: two stages of q, k and v filled by cp.async, two block barriers a chunk.
#pragma once

#include "kvk/device/lightning_state.cuh"

namespace kvk::device {

template <class Config>
class LightningForward {
 public:
  using T = typename Config::T;
  static constexpr int kChunk = LightningShape::kChunk, kColumns = LightningShape::kColumns;
  static constexpr int kDim = Config::kDim, kPitch = Config::kPitch, kStages = Config::kStages;
  static constexpr int kScorePitch = LightningShape::kScorePitch, kValuePitch = LightningShape::kValuePitch;
  static constexpr int kScoreParts = Config::kScoreParts, kInputParts = Config::kInputParts;
  static constexpr int kKeys = Config::kShape.key_elements(), kValues = Config::kShape.value_elements();
  static constexpr int kScores = Config::kShape.score_elements();

  KVK_DEVICE LightningForward(const LightningParams& p, SmemCarver carve)
      : p_(p), q_(carve.take<T>(size_t(kStages) * kKeys)), k_(carve.take<T>(size_t(kStages) * kKeys)),
        v_(carve.take<T>(size_t(kStages) * kValues)), scores_(carve.take<bf16>(size_t(kScoreParts) * kScores)),
        decays_(carve.take<float>(2 * LightningShape::kDecayFloats)), item_(*carve.take<LightningItem>(1)) {}

  KVK_DEVICE void run() {
    LightningItem item;
    if (!item.find(p_.sequences, p_.num_heads, p_.dv)) return clear(item);
    // All threads know the item; from here on they read it from shared memory, which frees a dozen registers.
    if (threadIdx.x == 0) item_ = item;
    __syncthreads();
    state_.load(item_.state(p_.initial), p_.initial, p_.dk, p_.dv, column());
    const float* logs = item_.rows<const float>(p_.log_decay);
    if (p_.log_decay.data == nullptr) logs = nullptr;
    if (warp() == 0) decay(0).prepare(load_decays(logs, 0));
    if (item_.tokens > 0) load(0, 0);
    ptx::cp_async_commit();
    for (int64_t first = 0, chunk = 0; first < item_.tokens; first += kChunk, ++chunk) {
      const int stage = static_cast<int>(chunk % kStages);
      const bool more = first + kChunk < item_.tokens;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this chunk and its decays are there for all; the other stage is free
      if (kStages == 2 && more) load(stage ^ 1, first + kChunk);
      ptx::cp_async_commit();
      float2 next = {};
      if (warp() == 0) next = load_decays(logs, first + kChunk);
      step(stage, first, decay(chunk));
      if (warp() == 0) decay(chunk + 1).prepare(next);
      if (kStages == 1 && more) {
        __syncthreads();  // all are done with the only stage
        load(0, first + kChunk);
        ptx::cp_async_commit();
      }
    }
    store_state(logs);
  }

 private:
  using State = WarpState<T, kDim, kPitch>;
  using Output = typename State::Columns;  // out^T, [16, C]

  // Not kept: a register more than it costs to ask again.
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE static int warp() { return threadIdx.x / 32; }
  KVK_DEVICE int column() const { return item_.column + warp() * 16; }  // this warp's first one
  KVK_DEVICE ChunkDecay decay(int64_t chunk) const {
    return ChunkDecay(decays_ + chunk % 2 * LightningShape::kDecayFloats);
  }

  // From the end a token decays by what the one after it in time decays by.
  KVK_DEVICE int shift() const { return p_.sequences.reversed ? 1 : 0; }
  KVK_DEVICE float2 load_decays(const float* logs, int64_t first) const {
    return ChunkDecay::load(logs, p_.log_decay.token_stride, shift(), first, item_.tokens);
  }

  KVK_DEVICE void load(int stage, int64_t first) const {
    copy_chunk<kDim, kPitch>(q_ + stage * kKeys, item_.rows<const T>(p_.q), p_.q.token_stride, first, item_.tokens,
                             p_.dk);
    copy_chunk<kDim, kPitch>(k_ + stage * kKeys, item_.rows<const T>(p_.k), p_.k.token_stride, first, item_.tokens,
                             p_.dk);
    copy_chunk<kColumns, kValuePitch>(v_ + stage * kValues, item_.rows<const T>(p_.v) + item_.column, p_.v.token_stride,
                                      first, item_.tokens, p_.dv - item_.column);
  }

  KVK_DEVICE void step(int stage, int64_t first, const ChunkDecay& decay) {
    const T *q = q_ + stage * kKeys, *k = k_ + stage * kKeys;
    T* v = v_ + stage * kValues + warp() * 16;  // this warp's columns
    scores(q, k, decay);
    uint32_t out[kChunk / 8][2];
    {
      Output sums = {};
      add_past(q, decay, sums);
      __syncthreads();  // the scores of all warps are there
      add_values(v, sums);
      KVK_UNROLL
      for (int n = 0; n < kChunk / 8; ++n) {
        KVK_UNROLL
        for (int i = 0; i < 2; ++i) out[n][i] = pack2<T>(sums[n][2 * i], sums[n][2 * i + 1]);
      }
    }
    update(v, k, decay);
    write(v, first, out);
  }

  // A of this warp's blocks of 16 x 16 tokens at and below the diagonal.
  KVK_DEVICE void scores(const T* q, const T* k, const ChunkDecay& decay) const {
    each_block_of_triangle([&](int i, int j) {
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
            weighted[e] = from + e <= to ? s[n][half * 2 + e] * p_.scale * decay.between(to, from + e) : 0.0f;
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

  // out^T = S^T Q^T, decayed since the chunk's start.
  KVK_DEVICE void add_past(const T* q, const ChunkDecay& decay, Output& out) const {
    state_.template read<kScoreParts>(q, out);
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) out[n][i] *= p_.past_scale * decay.since_start(n * 8 + lane() % 4 * 2 + i % 2);
    }
  }

  // out^T += V^T A^T. A weight of 0 times NaN would reach the tokens before it: values that are not finite are left to
  // add_nonfinite.
  KVK_DEVICE void add_values(const T* v, Output& out) const {
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
        if (n * 8 < step * 16) continue;  // earlier tokens
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
    if (!__all_sync(0xffffffffu, finite)) add_nonfinite(v, out);
  }

  // NaN and infinities among the values, to the tokens that read them.
  KVK_DEVICE void add_nonfinite(const T* v, Output& out) const {
    KVK_NO_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const T left = v[j * kValuePitch + lane() / 4], right = v[j * kValuePitch + lane() / 4 + 8];
      KVK_UNROLL
      for (int n = 0; n < kChunk / 8; ++n) {
        KVK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + lane() % 4 * 2 + i % 2;
          const T x = i < 2 ? left : right;
          if (j > token || is_finite(x)) continue;
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

  // By way of the place of the warp's values, so that memory is written in pieces of 32 bytes.
  KVK_DEVICE void write(T* v, int64_t first, const uint32_t (&out)[kChunk / 8][2]) const {
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
      if (first + row < item_.tokens && column < columns) {
        store_words(to + (first + row) * p_.out.token_stride + column, load_words<4>(v + row * kValuePitch + column));
      }
    }
  }

  // S^T = decay S^T + (decayed V)^T K.
  KVK_DEVICE void update(const T* v, const T* k, const ChunkDecay& decay) {
    state_.add(v, k, decay.whole(), [&](int token) { return decay.to_end(token) * p_.key_scale; });
  }

  KVK_DEVICE void store_state(const float* logs) {
    float* to = item_.state(p_.final);
    if (to == nullptr) return;
    // From the end, what the first token in time decays by is left.
    const float left =
        p_.sequences.reversed
            ? expf(ChunkDecay::load_one(logs, p_.log_decay.token_stride, 1, item_.tokens, item_.tokens + 1))
            : 1.0f;
    state_.store(to, p_.final, p_.dk, p_.dv, column(), left);
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

template <class Config>
KVK_KERNEL(LightningShape::kThreads, 1)
lightning_forward_kernel(const __grid_constant__ LightningParams params) {
  LightningForward<Config>(params, SmemCarver()).run();
}

}  // namespace kvk::device
