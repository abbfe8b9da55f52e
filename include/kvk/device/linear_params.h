// Parameters of the kernels of normalised linear attention, and the blocks that both backends walk through.
#pragma once

#include "kvk/device/lightning_params.h"

namespace kvk::device {

// Consecutive tokens of a sequence, whole blocks of them. Token i of the group is in its block (i + shift) / size.
struct LinearGroup {
  static constexpr int kChunk = LightningShape::kChunk;

  int64_t first, count;
  int64_t size;
  int shift;

  KVK_HOST_DEVICE bool one_block() const { return size > kChunk / 2; }
  KVK_HOST_DEVICE int block(int64_t i) const {
    return one_block() ? 0 : (static_cast<int>(i) + shift) / static_cast<int>(size);
  }
  // The group's tokens that its token i sees, where they all share a chunk.
  KVK_HOST_DEVICE int end(int i) const {
    const int tokens = static_cast<int>(count), step = static_cast<int>(size);
    if (one_block()) return tokens;
    const int end = ((i + shift) / step + 1) * step - shift;
    return end < tokens ? end : tokens;
  }
};

// A sequence's blocks; in reverse the short one comes first.
struct LinearBlocks {
  int64_t tokens, size, first;

  KVK_HOST_DEVICE LinearBlocks(bool causal, int64_t block_size, int64_t num_tokens, bool reversed)
      : tokens(num_tokens), size(num_tokens < 1                       ? 1
                                 : !causal || num_tokens < block_size ? num_tokens
                                                                      : block_size),
        first(reversed && tokens % size != 0 ? tokens % size : size) {}

  // Of blocks of more than half a chunk one, else as many as share a chunk.
  KVK_HOST_DEVICE LinearGroup at(int64_t token) const {
    constexpr int kChunk = LinearGroup::kChunk;
    const int64_t block = token == 0 ? first : size;
    const int64_t count = block + (size > kChunk / 2 ? 0 : (kChunk / size - 1) * size);
    return {token, count < tokens - token ? count : tokens - token, size, static_cast<int>(size - block)};
  }
};

// Parts of what is computed on the way to the output: floats are wanted as exact as fp32.
KVK_HOST_DEVICE constexpr int linear_parts(bool is_bf16, bool floats) { return floats ? 3 : lightning_parts(is_bf16); }

template <class T_, int kDim_, bool kFloats_>
struct LinearConfig {
  using T = T_;
  static constexpr bool kFloats = kFloats_;  // the output is of floats, else of T
  static constexpr bool kBf16 = kSameType<T_, bf16>;
  static constexpr int kInputParts = lightning_parts(kBf16), kScoreParts = linear_parts(kBf16, kFloats_);
  static constexpr LightningShape kShape = LightningShape(kDim_, kScoreParts, true);
  static constexpr int kDim = kShape.dim, kPitch = kShape.pitch, kStages = kShape.stages;
};

// out_i = finish_i * (scale * S^T q_i + scale * sum of source_j (q_i . k_j) v_j over the tokens j that token i sees).
// S += source_j k_j v_j^T
struct LinearParams {
  LightningParams rows;  // no decays; scale is of both parts of out
  SequenceView den;      // finish = 1 / (den + eps), in floats; data null: 1
  SequenceView source;   // floats; data null: 1
  float eps;
  int64_t block_size;
  bool causal;
};

// What the running sum z of rows is made of and used for.
struct LinearSumsParams {
  enum Use : int32_t {
    kDen,    // den = scale * q . z
    kQuery,  // the gradient of q, and the factors of the other gradients
    kKey,    // the gradient of k
  };
  SequenceView rows;    // of T, what z is the sum of
  SequenceView weight;  // floats, of the rows; data null: 1
  SequenceView q_den;   // of T
  SequenceView den;     // kDen: written
  // Gradients.
  SequenceView q;               // of T
  SequenceView grad_den;        // floats; data null: 0
  SequenceView raw;             // floats: the gradient without the factor of each token and without z
  SequenceView grad;            // of T, written: as q or k
  SequenceView grad_apart;      // of T, written: as q_den or k_den; data null: grad holds both
  SequenceView of_out, of_den;  // floats, written by kQuery: factors of grad_out and of q_den in the gradients of keys
  StateView initial, final;     // of a sequence and head, [Dk] along the columns. data null: zeros, not written
  SequenceStarts sequences;
  int32_t num_heads, dk;
  Use use;
  float scale, eps;
  int64_t block_size;
  bool causal, normalize;
};

}  // namespace kvk::device
