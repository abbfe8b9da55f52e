// Normalised linear attention: what the tokens of a sequence sum over those that they see, and its state.
//   out_i = finish_i * (scale * S^T q_i + scale * sum of source_j (q_i . k_j) v_j)        S += source_j k_j v_j^T
// Lightning attention's chunks without decays. Blocks of up to half a chunk share one, with masked scores; of a longer block the
// state takes up all keys first, and its queries read the state: no scores, but k and v, then q, are fetched apart. The denominators,
// and all that needs whole rows, are linear_sums.cuh's. The gradients of q, k and v are this kernel in other roles
// (csrc/cuda/linear.cc).
//
// FLOPs a token and head: those of lightning.cuh, a chunk of small blocks up to twice its scores; without a mask 4 Dk Dv, of which
// the state's half in three bf16 parts. Bytes: q, k, v, out once. Tile: as there. One stage: two blocks share a multiprocessor.
#pragma once

#include "kvk/device/lightning_pass.cuh"
#include "kvk/device/linear_params.h"

namespace kvk::device {

// Weights of a chunk, in shared memory.
struct LinearWeights {
  static constexpr int kChunk = LightningShape::kChunk;

  float *ends, *sources, *finishes;  // of each token; ends: the first token that it does not see, which never decreases
  float scale;

  KVK_DEVICE LinearWeights(float* memory, float factor)
      : ends(memory), sources(memory + kChunk), finishes(memory + 2 * kChunk), scale(factor) {}

  template <class Call>
  KVK_DEVICE void each_block(Call&& call) const {
    int turn = 0;
    KVK_NO_UNROLL
    for (int block = 0; block < kChunk / 16 * (kChunk / 16); ++block) {
      const int to = block / (kChunk / 16) * 16, from = block % (kChunk / 16) * 16;
      if (reads(to, from) && turn++ % LightningShape::kWarps == static_cast<int>(threadIdx.x / 32)) call(to, from);
    }
  }
  KVK_DEVICE bool reads(int to, int from) const { return sees(to + 15, from); }
  KVK_DEVICE bool sees(int to, int from) const { return static_cast<float>(from) < ends[to]; }
  KVK_DEVICE float weigh(float s, int, int from) const { return s * scale * sources[from]; }
  KVK_DEVICE float past(int) const { return scale; }
  KVK_DEVICE float whole() const { return 1.0f; }
  KVK_DEVICE float source(int token) const { return sources[token]; }
};
static_assert(3 * LinearWeights::kChunk <= 2 * LightningShape::kDecayFloats);

template <class Config>
class LinearForward : ChunkPass<Config> {
  using Base = ChunkPass<Config>;
  using Base::item_, Base::p_, Base::q_, Base::k_, Base::v_, Base::kChunk;
  using Base::lane, Base::warp, Base::column;
  using typename Base::Output, typename Base::Packed, typename Base::T;

 public:
  KVK_DEVICE LinearForward(const LinearParams& p, SmemCarver carve) : Base(p.rows, carve), all_(p) {
    static_assert(Config::kStages == 1);
  }

  KVK_DEVICE void run() {
    LightningItem item;
    const bool owned = item.find(p_.sequences, p_.num_heads, p_.dv);
    if constexpr (!Config::kFloats) {
      if (!owned) this->clear(item);
    }
    if (!owned) return;
    if (threadIdx.x == 0) item_ = item;
    __syncthreads();
    this->state_.load(item_.state(p_.initial), p_.initial, p_.dk, p_.dv, column());
    const LinearBlocks blocks(all_.causal, all_.block_size, item_.tokens, p_.sequences.reversed);
    int64_t next = 0;
    for (int64_t first = 0; first < item_.tokens; first = next) {
      const LinearGroup group = blocks.at(first);
      next = first + group.count;
      if (!group.one_block()) {
        together(group);
        continue;
      }
      for (int64_t at = first; at < next; at += kChunk) add_to_state(at, next);
      for (int64_t at = first; at < next; at += kChunk) read_state(at, next);
    }
    float* to = item_.state(p_.final);
    this->state_.store(to, p_.final, p_.dk, p_.dv, column(), 1.0f);
  }

 private:
  KVK_DEVICE LinearWeights weights() const { return LinearWeights(this->decays_, p_.scale); }

  // A number of each token in memory, or `none`.
  KVK_DEVICE float number(const SequenceView& view, int64_t token, float none) const {
    return view.data == nullptr ? none : item_.template rows<const float>(view)[token * view.token_stride];
  }
  // The factors of the tokens before `end`.
  KVK_DEVICE void prepare(int64_t first, int64_t end) const {
    const int i = threadIdx.x;
    if (i >= kChunk || first + i >= end) return;
    weights().sources[i] = number(all_.source, first + i, 1.0f);
    weights().finishes[i] = all_.den.data == nullptr ? 1.0f : 1.0f / (number(all_.den, first + i, 0.0f) + all_.eps);
  }
  KVK_DEVICE void start() const {
    __syncthreads();  // all are done with the chunk before
  }
  KVK_DEVICE void arrive() const {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // the rows and the factors are there for all
  }

  // Blocks that share a chunk.
  KVK_DEVICE void together(const LinearGroup& group) {
    const int64_t end = group.first + group.count;
    start();
    this->load_keys(q_, p_.q, group.first, end);
    this->load_keys(k_, p_.k, group.first, end);
    this->load_values(v_, group.first, end);
    const int i = threadIdx.x, last = static_cast<int>(group.count) - 1;
    if (i < kChunk) weights().ends[i] = static_cast<float>(group.end(i < last ? i : last));
    clear_factors(group.count);
    prepare(group.first, end);
    arrive();
    T* v = v_ + warp() * 16;
    this->scores(q_, k_, weights());
    Packed out;
    {
      Output sums = {};
      this->attend(q_, v, weights(), sums);
      finish(group.first, end, sums, out);
    }
    this->update(v, k_, weights());
    if constexpr (!Config::kFloats) this->write(v, group.first, end, out);
  }
  // Those of the tokens behind the last one: their rows are zeros.
  KVK_DEVICE void clear_factors(int64_t count) const {
    const int i = threadIdx.x;
    if (i < kChunk && i >= count) weights().sources[i] = weights().finishes[i] = 0.0f;
  }

  // A chunk of a block to the state, and from it.
  KVK_DEVICE void add_to_state(int64_t first, int64_t end) {
    start();
    this->load_keys(k_, p_.k, first, end);
    this->load_values(v_, first, end);
    clear_factors(end - first);
    prepare(first, end);
    arrive();
    this->update(v_ + warp() * 16, k_, weights());
  }
  KVK_DEVICE void read_state(int64_t first, int64_t end) const {
    start();
    this->load_keys(q_, p_.q, first, end);
    clear_factors(end - first);
    prepare(first, end);
    arrive();
    Packed out;
    {
      Output sums = {};
      this->add_past(q_, weights(), sums);
      finish(first, end, sums, out);
    }
    if constexpr (!Config::kFloats) this->write(v_ + warp() * 16, first, end, out);
  }

  // The result, in memory as floats, or packed.
  KVK_DEVICE void finish(int64_t first, int64_t end, Output& sums, Packed& out) const {
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] *= weights().finishes[n * 8 + lane() % 4 * 2 + i % 2];
    }
    if constexpr (!Config::kFloats) return this->pack(sums, out);
    float* to = item_.template rows<float>(p_.out);
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t token = first + n * 8 + lane() % 4 * 2 + i % 2;
        const int at = column() + lane() / 4 + i / 2 * 8;
        if (token < end && at < p_.dv) to[token * p_.out.token_stride + at] = sums[n][i];
      }
    }
  }

  const LinearParams& all_;
};

template <class Config>
KVK_KERNEL(LightningShape::kThreads, 1)
linear_forward_kernel(const __grid_constant__ LinearParams params) {
  LinearForward<Config>(params, SmemCarver()).run();
}

}  // namespace kvk::device
