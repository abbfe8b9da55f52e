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

#include "kvk/device/lightning_pass.cuh"

namespace kvk::device {

// Weights of a chunk whose tokens see themselves and those before.
struct DecayWeights {
  const ChunkDecay& decay;
  const LightningParams& p;

  template <class Call>
  KVK_DEVICE void each_block(Call&& call) const {
    each_block_of_triangle(call);
  }
  KVK_DEVICE bool reads(int to, int from) const { return to >= from; }
  KVK_DEVICE bool sees(int to, int from) const { return from <= to; }
  KVK_DEVICE float weigh(float s, int to, int from) const { return s * p.scale * decay.between(to, from); }
  KVK_DEVICE float past(int token) const { return p.past_scale * decay.since_start(token); }
  KVK_DEVICE float whole() const { return decay.whole(); }
  KVK_DEVICE float source(int token) const { return decay.to_end(token) * p.key_scale; }
};

template <class Config>
class LightningForward : ChunkPass<Config> {
  using Base = ChunkPass<Config>;
  using Base::item_, Base::p_, Base::state_, Base::kStages, Base::kChunk, Base::kKeys, Base::kValues;
  using Base::warp, Base::column;
  using typename Base::Output, typename Base::Packed, typename Base::T;

 public:
  KVK_DEVICE LightningForward(const LightningParams& p, SmemCarver carve) : Base(p, carve) {}

  KVK_DEVICE void run() {
    LightningItem item;
    if (!item.find(p_.sequences, p_.num_heads, p_.dv)) return this->clear(item);
    // All threads know the item; from here on they read it from shared memory, which frees a dozen registers.
    if (threadIdx.x == 0) item_ = item;
    __syncthreads();
    state_.load(item_.state(p_.initial), p_.initial, p_.dk, p_.dv, column());
    const float* logs = item_.template rows<const float>(p_.log_decay);
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
  KVK_DEVICE ChunkDecay decay(int64_t chunk) const {
    return ChunkDecay(this->decays_ + chunk % 2 * LightningShape::kDecayFloats);
  }

  // From the end a token decays by what the one after it in time decays by.
  KVK_DEVICE int shift() const { return p_.sequences.reversed ? 1 : 0; }
  KVK_DEVICE float2 load_decays(const float* logs, int64_t first) const {
    return ChunkDecay::load(logs, p_.log_decay.token_stride, shift(), first, item_.tokens);
  }

  KVK_DEVICE void load(int stage, int64_t first) const {
    this->load_keys(this->q_ + stage * kKeys, p_.q, first, item_.tokens);
    this->load_keys(this->k_ + stage * kKeys, p_.k, first, item_.tokens);
    this->load_values(this->v_ + stage * kValues, first, item_.tokens);
  }

  KVK_DEVICE void step(int stage, int64_t first, const ChunkDecay& decay) {
    const T *q = this->q_ + stage * kKeys, *k = this->k_ + stage * kKeys;
    T* v = this->v_ + stage * kValues + warp() * 16;  // this warp's columns
    const DecayWeights weights = {decay, p_};
    this->scores(q, k, weights);
    Packed out;
    {
      Output sums = {};
      this->attend(q, v, weights, sums);
      this->pack(sums, out);
    }
    this->update(v, k, weights);
    this->write(v, first, item_.tokens, out);
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
};

template <class Config>
KVK_KERNEL(LightningShape::kThreads, 1)
lightning_forward_kernel(const __grid_constant__ LightningParams params) {
  LightningForward<Config>(params, SmemCarver()).run();
}

}  // namespace kvk::device
