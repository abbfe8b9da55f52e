// The running sum z of the rows that a token sees, and what needs it or a whole row (csrc/cuda/linear.cc has the formulas): the
// denominators; of the gradients, q's with the factors of the others, and k's.
// Bound by memory: the rows of z twice, of which the second time from the cache, and what is made of them.
// Tile: a block takes a head of a sequence, a chunk of small blocks or a long block at a time; a warp consecutive blocks of the chunk
// or every fourth token of the long one, two neighbouring channels a lane and 64.
#pragma once

#include "kvk/device/lightning_chunk.cuh"
#include "kvk/device/linear_params.h"

namespace kvk::device {

template <class T>
class LinearSums {
 public:
  static constexpr int kChunk = LightningShape::kChunk, kWarps = LightningShape::kWarps;
  static constexpr int kThreads = LightningShape::kThreads, kMost = kMostLightningDim, kPairs = kMost / 64;

  KVK_DEVICE LinearSums(const LinearSumsParams& p, float (&parts)[kWarps][kMost], float (&total)[kMost])
      : p_(p), parts_(parts), total_(total) {}

  KVK_DEVICE void run() {
    if (!item_.find(p_.sequences, p_.num_heads, LightningShape::kColumns)) return clear();
    const float* initial = item_.state(p_.initial);
    for (int c = threadIdx.x; c < kMost; c += kThreads) {
      total_[c] = initial != nullptr && c < p_.dk ? initial[c * p_.initial.column_stride] : 0.0f;
    }
    const LinearBlocks blocks(p_.causal, p_.block_size, item_.tokens, p_.sequences.reversed);
    LinearGroup group;
    for (int64_t first = 0; first < item_.tokens; first += group.count) {
      group = blocks.at(first);
      if (group.one_block()) {
        one_block(group);
      } else {
        small_blocks(group);
      }
    }
    __syncthreads();  // the last sum is whole
    float* final = item_.state(p_.final);
    if (final == nullptr) return;
    for (int c = threadIdx.x; c < p_.dk; c += kThreads) final[c * p_.final.column_stride] = total_[c];
  }

 private:
  using Row = float[kPairs][2];  // this lane's channels

  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE static int warp() { return threadIdx.x / 32; }
  KVK_DEVICE static int channel(int pair) { return pair * 64 + lane() * 2; }

  template <class Call>
  KVK_DEVICE void each_pair(Call&& call) const {
    KVK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      if (channel(pair) < p_.dk) call(pair, channel(pair));
    }
  }
  KVK_DEVICE void load(const SequenceView& view, int64_t token, Row& to) const {
    const T* row = item_.rows<const T>(view) + token * view.token_stride;
    each_pair([&](int pair, int c) {
      const float2 x = unpack2<T>(load_words<1>(row + c).w[0]);
      to[pair][0] = x.x;
      to[pair][1] = x.y;
    });
  }
  KVK_DEVICE void store(const SequenceView& view, int64_t token, const Row& from) const {
    T* row = item_.rows<T>(view) + token * view.token_stride;
    each_pair([&](int pair, int c) { store_words<1>(row + c, {{pack2<T>(from[pair][0], from[pair][1])}}); });
  }
  KVK_DEVICE float& number(const SequenceView& view, int64_t token) const {
    return item_.rows<float>(view)[token * view.token_stride];
  }
  // In all lanes.
  KVK_DEVICE static float dot(const Row& a, const Row& b) {
    float sum = 0;
    KVK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) sum += a[pair][0] * b[pair][0] + a[pair][1] * b[pair][1];
    return warp_sum(sum);
  }

  // to += the rows of tokens from `first` to `end`, times their weights.
  KVK_DEVICE void add_rows(int64_t first, int64_t end, Row& to) const {
    for (int64_t token = first; token < end; ++token) {
      const float weight = p_.weight.data == nullptr ? 1.0f : number(p_.weight, token);
      Row row = {};
      load(p_.rows, token, row);
      KVK_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        to[pair][0] += row[pair][0] * weight;
        to[pair][1] += row[pair][1] * weight;
      }
    }
  }
  // This warp's part of a chunk, the tokens from `first` to `end`; then all warps' parts are there.
  KVK_DEVICE void put_part(int64_t first, int64_t end) const {
    Row part = {};
    add_rows(first, end, part);
    __syncthreads();  // the parts of the chunk before have been read
    each_pair([&](int pair, int c) {
      parts_[warp()][c] = part[pair][0];
      parts_[warp()][c + 1] = part[pair][1];
    });
    __syncthreads();  // the parts of all warps are there
  }
  KVK_DEVICE void add_parts() const {
    for (int c = threadIdx.x; c < p_.dk; c += kThreads) {
      float sum = 0;
      KVK_UNROLL
      for (int w = 0; w < kWarps; ++w) sum += parts_[w][c];
      total_[c] += sum;
    }
  }
  // The sum so far with the parts of `warps` warps.
  KVK_DEVICE void sum_so_far(int warps, Row& z) const {
    each_pair([&](int pair, int c) {
      for (int e = 0; e < 2; ++e) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += parts_[w][c + e];
        z[pair][e] = total_[c + e] + sum;
      }
    });
  }

  KVK_DEVICE void one_block(const LinearGroup& group) const {
    const int64_t end = group.first + group.count;
    for (int64_t chunk = group.first; chunk < end; chunk += kChunk) {
      const int64_t first = chunk + warp() * (kChunk / kWarps), last = first + kChunk / kWarps;
      put_part(first < end ? first : end, last < end ? last : end);
      add_parts();
    }
    __syncthreads();  // the sum over the block is whole
    Row z = {};
    sum_so_far(0, z);
    for (int64_t token = group.first + warp(); token < end; token += kWarps) use(token, z);
  }

  KVK_DEVICE void small_blocks(const LinearGroup& group) const {
    const int blocks = group.block(group.count - 1) + 1, each = ceil_div(blocks, kWarps);
    const int begin = warp() * each < blocks ? warp() * each : blocks;
    const int end = begin + each < blocks ? begin + each : blocks;
    put_part(start_of(group, begin), start_of(group, end));
    Row z = {};
    sum_so_far(warp(), z);
    for (int block = begin; block < end; ++block) {
      const int64_t first = start_of(group, block), next = start_of(group, block + 1);
      add_rows(first, next, z);
      for (int64_t token = first; token < next; ++token) use(token, z);
    }
    __syncthreads();  // all have read the sum and the parts
    add_parts();
  }
  KVK_DEVICE static int64_t start_of(const LinearGroup& group, int block) {
    const int64_t at = block * group.size - group.shift;
    return group.first + (at < 0 ? 0 : at < group.count ? at : group.count);
  }

  KVK_DEVICE void use(int64_t token, const Row& z) const {
    if (p_.use == LinearSumsParams::kKey) return key_gradient(token, z);
    Row row = {};
    float den = 0;
    if (p_.use == LinearSumsParams::kDen || p_.normalize) {
      load(p_.q_den, token, row);
      den = p_.scale * dot(row, z);
    }
    if (p_.use == LinearSumsParams::kQuery) return query_gradient(token, z, den);
    if (lane() == 0) number(p_.den, token) = den;
  }

  // With g the gradient of den_i:  g = d den_i - dO . out_i / (den_i + eps) = d den_i - (q_i . dq_i) / (den_i + eps)
  KVK_DEVICE void query_gradient(int64_t token, const Row& z, float den) const {
    float g = p_.grad_den.data == nullptr ? 0.0f : number(p_.grad_den, token), factor = 1.0f;
    Row grad = {};
    load_raw(token, grad);
    if (p_.normalize) {
      factor = 1.0f / (den + p_.eps);
      KVK_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        grad[pair][0] *= factor;
        grad[pair][1] *= factor;
      }
      Row q = {};
      load(p_.q, token, q);
      g -= dot(q, grad) * factor;
    }
    if (lane() == 0) {
      number(p_.of_out, token) = p_.scale * factor;
      number(p_.of_den, token) = p_.scale * g;
    }
    put(token, grad, z, p_.scale * g);
  }
  KVK_DEVICE void key_gradient(int64_t token, const Row& z) const {
    Row grad = {};
    load_raw(token, grad);
    put(token, grad, z, 1.0f);
  }
  KVK_DEVICE void load_raw(int64_t token, Row& to) const {
    const float* row = &number(p_.raw, token);
    each_pair([&](int pair, int c) {
      to[pair][0] = row[c];
      to[pair][1] = row[c + 1];
    });
  }
  // grad + factor * z as one gradient, or as two.
  KVK_DEVICE void put(int64_t token, Row& grad, const Row& z, float factor) const {
    Row apart;
    KVK_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      KVK_UNROLL
      for (int e = 0; e < 2; ++e) {
        apart[pair][e] = z[pair][e] * factor;
        if (p_.grad_apart.data == nullptr) grad[pair][e] += apart[pair][e];
      }
    }
    store(p_.grad, token, grad);
    if (p_.grad_apart.data != nullptr) store(p_.grad_apart, token, apart);
  }

  // Tokens of no sequence.
  KVK_DEVICE void clear() const {
    const Row zeros = {};
    for (int64_t token = warp(); token < item_.tokens; token += kWarps) {
      if (p_.use != LinearSumsParams::kDen) {
        store(p_.grad, token, zeros);
        if (p_.grad_apart.data != nullptr) store(p_.grad_apart, token, zeros);
      } else if (lane() == 0) {
        number(p_.den, token) = 0.0f;
      }
    }
  }

  const LinearSumsParams& p_;
  float (&parts_)[kWarps][kMost];
  float (&total_)[kMost];
  LightningItem item_;
};

template <class T>
KVK_KERNEL(LightningShape::kThreads, 1)
linear_sums_kernel(const __grid_constant__ LinearSumsParams params) {
  KVK_SHARED(parts, float[LightningShape::kWarps][kMostLightningDim]);
  KVK_SHARED(total, float[kMostLightningDim]);
  LinearSums<T>(params, parts, total).run();
}

}  // namespace kvk::device
