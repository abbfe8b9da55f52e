// Parameters of the lightning attention kernels.
#pragma once

#include "kvk/device/paged_problem.h"

namespace kvk::device {

inline constexpr int kMostLightningDim = 256;

// fp32 [slots, heads, Dk, Dv].
struct StateView {
  float* data;
  int64_t slot_stride, head_stride, row_stride, column_stride;  // elements
};

// fp32 log decays of (row or token, head); null: no decay. row_stride 0: of a head alone.
struct DecayView {
  const float* data;
  int64_t row_stride, head_stride;

  KVK_HOST_DEVICE const float* at(int64_t row, int64_t head) const {
    return data == nullptr ? nullptr : data + row * row_stride + head * head_stride;
  }
};

struct LightningDecodeParams {
  RowsView q, k, v;  // [batch, heads, Dk] and [.., Dv], rows on multiples of 16 bytes
  RowsView out;      // written
  StateView state;   // updated in place; rows on multiples of 16 bytes, columns beside each other
  int64_t num_slots;
  const int32_t* slots;  // [batch]; negative: skip
  int64_t slots_stride;
  DecayView log_decay;
  int32_t num_heads, dk, dv;
  float scale;
};

// Element 0 of (batch row, token, head) of a [B, T, H, ..] tensor.
struct SequenceView {
  void* data;                                       // log decays: null for none
  int64_t batch_stride, token_stride, head_stride;  // elements; log decays of heads alone: 0, 0, ..
};

// Which tokens are a sequence.
struct SequenceStarts {
  const int32_t* starts;  // [num_sequences + 1], of batch row 0; null: a sequence a batch row
  int64_t stride;
  int64_t num_sequences, num_tokens;  // num_tokens: of a batch row
  // Tokens are counted from the end: token 0 is the last one of a batch row, and the last one of a sequence its first.
  bool reversed;

  // Starts that are off never lead past the tokens.
  KVK_HOST_DEVICE int64_t start(int64_t n) const {
    const int64_t at = starts[n * stride];
    return at < 0 ? 0 : at < num_tokens ? at : num_tokens;
  }
};

struct LightningParams {
  SequenceView q, k, v;  // rows on multiples of 16 bytes
  SequenceView out;      // written
  SequenceView log_decay;
  StateView initial,
      final;  // of a sequence. initial.data null: zeros. final is written, unless null, and may be initial
  SequenceStarts sequences;
  int32_t num_heads, dk, dv;
  // out = scale * (tokens of the chunk) + past_scale * S^T q;  S += key_scale * k v^T
  float scale, past_scale, key_scale;
};

// Sizes that follow from Dk; the kernel uses them as constants, the launch code to ask for shared memory.
struct LightningShape {
  static constexpr int kChunk = 64, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kColumns = 16 * kWarps;  // of v, of a block
  // Of a row in shared memory, elements; keeps ldmatrix free of bank conflicts.
  static constexpr int kScorePitch = kChunk + 8, kValuePitch = kColumns + 8;
  static constexpr int kDecayFloats = 4 * kChunk + 4, kItemBytes = 48;  // sizeof(LightningItem)

  int dim, pitch;   // of k and q: mma works on 16 channels at a time; the padding is filled with zeros
  int stages;       // beyond Dk 128 one: so many bytes of q and k that two blocks could not fit beside each other
  int score_parts;  // bf16 numbers that stand for a score

  // small: for cards that give a block 99 KiB (sm_86, sm_89, sm_120), where the usual shape wants more.
  KVK_HOST_DEVICE constexpr LightningShape(int dk, int parts, bool small)
      : dim(round_up(dk, 16)), pitch(dim + 8), stages(small || dim > 128 ? 1 : 2), score_parts(parts) {}

  KVK_HOST_DEVICE constexpr size_t key_elements() const { return size_t(kChunk) * pitch; }
  KVK_HOST_DEVICE constexpr size_t value_elements() const { return size_t(kChunk) * kValuePitch; }
  KVK_HOST_DEVICE constexpr size_t score_elements() const { return size_t(kChunk) * kScorePitch; }
  // In the order in which the kernel takes its parts; all are multiples of 16 bytes.
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    return (stages * (2 * key_elements() + value_elements()) + score_parts * score_elements()) * 2 +
           2 * kDecayFloats * sizeof(float) + kItemBytes;
  }
};

// Numbers of bf16 that an input is the sum of: an f16 is two, exactly. What is computed on the way to an output takes as many.
KVK_HOST_DEVICE constexpr int lightning_parts(bool is_bf16) { return is_bf16 ? 1 : 2; }

template <class T_, int kDim_, bool kSmall_ = false>
struct LightningConfig {
  using T = T_;
  static constexpr int kInputParts = lightning_parts(kSameType<T_, bf16>), kScoreParts = kInputParts;
  static constexpr LightningShape kShape = LightningShape(kDim_, kScoreParts, kSmall_);
  static constexpr int kDim = kShape.dim, kPitch = kShape.pitch, kStages = kShape.stages;
};

// The gradient of the log decays.
struct LightningDecayParams {
  SequenceView q, k, v, grad;  // grad: of out. Rows on multiples of 16 bytes
  SequenceView log_decay;
  StateView initial, grad_final;  // data null: zeros
  SequenceStarts sequences;
  int32_t num_heads, dk, dv;
  int32_t tiles, value_tiles;  // of a head, and along dv
  float scale;
  bool per_token;
  int64_t num_rows, row_chunks;  // of the batch; chunks of a row, without starts
  float* states;                 // written, then read: the state before each chunk, as the registers have it
  double* past;                  // written, then read: [tiles, num_rows, tokens, heads]
  double* parts;  // written: [tiles, num_rows, tokens, heads] of tokens, [sequences, tiles, heads] of heads
};

// to = the sum of num_parts rows of `count` = rows * num_tokens * num_heads numbers.
struct SumPartsParams {
  const double* parts;
  int64_t num_parts, count, num_tokens;
  int32_t num_heads;
  bool warp_each;   // where parts are many; else a thread
  SequenceView to;  // float
};

struct LightningDecayShape {
  static constexpr int kPairs = LightningShape::kChunk * (LightningShape::kChunk - 1) / 2;
  static constexpr int kSums = LightningShape::kWarps * LightningShape::kChunk;

  static constexpr int kMostDim = 128;  // channels of k of a block; more would not fit its registers

  LightningShape rows;

  KVK_HOST_DEVICE constexpr explicit LightningDecayShape(int dim) : rows(dim, 1, true) {}
  KVK_HOST_DEVICE constexpr size_t key_elements() const { return rows.key_elements(); }
  KVK_HOST_DEVICE constexpr size_t value_elements() const { return rows.value_elements(); }
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const {
    return 2 * (key_elements() + value_elements()) * 2 +
           (kPairs + LightningShape::kDecayFloats + kSums) * sizeof(float) +
           (LightningShape::kWarps + 32) * sizeof(double) + LightningShape::kItemBytes;
  }
  // Blocks along dk, each with as many channels.
  KVK_HOST_DEVICE static constexpr int tiles(int dk) { return ceil_div(dk, kMostDim); }
  KVK_HOST_DEVICE static constexpr int tile_dim(int dk) { return round_up(ceil_div(dk, tiles(dk)), 16); }
  // Floats that a block keeps of a chunk.
  KVK_HOST_DEVICE constexpr int64_t kept_floats() const { return int64_t{LightningShape::kColumns} * rows.dim; }
};

template <class T_, int kDim_>
struct LightningDecayConfig {
  using T = T_;
  static constexpr LightningDecayShape kShape = LightningDecayShape(kDim_);
  static constexpr int kDim = kShape.rows.dim, kPitch = kShape.rows.pitch;
};

// Columns of a state that a block of the decode step takes: 128 bytes of a row, 8 lanes.
inline constexpr int kLightningDecodeColumns = 32;

}  // namespace kvk::device
