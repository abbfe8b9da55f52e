// What a chunk of lightning attention is made of: numbers as sums of bf16, the decays between tokens, the rows in shared
// memory.
#pragma once

#include "kvk/device/lightning_params.h"
#include "kvk/device/ptx.h"
#include "kvk/device/score.cuh"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

namespace kvk::device {

// Two floats as sums of kParts words of two bf16, the largest first: 8 bits of each a part, so that three are exact.
template <int kParts>
KVK_DEVICE void split_bf16(float x, float y, uint32_t (&parts)[kParts]) {
  KVK_UNROLL
  for (int i = 0; i < kParts; ++i) {
    parts[i] = pack2<bf16>(x, y);
    if (i + 1 == kParts) break;
    const float2 rounded = unpack2<bf16>(parts[i]);
    const float rest_x = x - rounded.x, rest_y = y - rounded.y;
    x = fabsf(rest_x) < kInfinity ? rest_x : 0.0f;  // nothing is left of NaN and infinities
    y = fabsf(rest_y) < kInfinity ? rest_y : 0.0f;
  }
}

// The words of an mma fragment as sums of fragments of bf16; words of T are two bf16 at most.
template <class T, int kWords, int kParts>
KVK_DEVICE void split_words(const uint32_t (&words)[kWords], uint32_t (&parts)[kParts][kWords]) {
  static_assert(kParts == (kSameType<T, bf16> ? 1 : 2));
  KVK_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kParts == 1) {
      parts[0][i] = words[i];
    } else {
      const float2 pair = unpack2<T>(words[i]);
      uint32_t split[kParts];
      split_bf16(pair.x, pair.y, split);
      KVK_UNROLL
      for (int p = 0; p < kParts; ++p) parts[p][i] = split[p];
    }
  }
}

// d += a * b of two fragments that are sums, without the products of two small parts: kOrder parts of the result are kept.
template <int kOrder, int kPartsA, int kPartsB>
KVK_DEVICE void mma_parts(float (&d)[4], const uint32_t (&a)[kPartsA][4], const uint32_t (&b)[kPartsB][4], int first) {
  KVK_UNROLL
  for (int i = 0; i < kPartsA; ++i) {
    KVK_UNROLL
    for (int j = 0; j < kPartsB; ++j) {
      if (i + j < kOrder) ptx::mma_m16n8k16<bf16>(d, a[i], b[j][first], b[j][first + 1]);
    }
  }
}

template <class T>
KVK_DEVICE bool is_finite(T x) {
  constexpr uint16_t kExponent = kSameType<T, bf16> ? 0x7f80 : 0x7c00;
  return (x.bits & kExponent) != kExponent;
}

// Of two elements of T, those that are finite, and 0 for the others.
template <class T>
KVK_DEVICE uint32_t finite_only(uint32_t word) {
  const uint32_t low = is_finite(T{uint16_t(word)}) ? 0xffffu : 0u;
  const uint32_t high = is_finite(T{uint16_t(word >> 16)}) ? 0xffff0000u : 0u;
  return word & (low | high);
}

// The decays of a chunk in shared memory: with G the running sum of the log decays from its start, exp(G_i - G_j) between
// tokens j <= i, exp(G_i) since the start, exp(G_last - G_j) to the end. Only differences that are <= 0 are taken to exp, so
// that nothing overflows, however strong the decay. G is kept in two floats: at G = -3000 one has an error of 1e-4, and so
// its exp.
class ChunkDecay {
 public:
  static constexpr int kChunk = LightningShape::kChunk;

  KVK_DEVICE explicit ChunkDecay(float* memory) : memory_(memory) {}

  KVK_DEVICE float between(int i, int j) const { return ptx::ex2(log_between(i, j) * kLog2e); }
  KVK_DEVICE float log_between(int i, int j) const { return (high(i) - high(j)) + (low(i) - low(j)); }
  KVK_DEVICE float since_start(int i) const { return memory_[2 * kChunk + i]; }
  KVK_DEVICE float to_end(int j) const { return memory_[3 * kChunk + j]; }
  KVK_DEVICE float whole() const { return memory_[4 * kChunk]; }

  // A warp writes it; a lane has the log decays of tokens 2 lane and 2 lane + 1, 0 past the end.
  KVK_DEVICE void prepare(float2 logs) const {
    const int lane = threadIdx.x % 32;
    const double first = logs.x, both = first + static_cast<double>(logs.y);
    double sum = both;
    KVK_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const double below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    double before = __shfl_up_sync(0xffffffffu, sum, 1);
    if (lane == 0) before = 0.0;
    const double total = __shfl_sync(0xffffffffu, sum, 31);
    write(2 * lane, before + first, total);
    write(2 * lane + 1, before + both, total);
    if (lane == 0) memory_[4 * kChunk] = expf(static_cast<float>(total));
  }

  // What prepare wants of the chunk that starts at token `first` of `count`. A token has the log decay of the one `shift`
  // before it, the first one none.
  KVK_DEVICE static float2 load(const float* logs, int64_t stride, int shift, int64_t first, int64_t count) {
    const int64_t at = first + threadIdx.x % 32 * 2;
    return make_float2(load_one(logs, stride, shift, at, count), load_one(logs, stride, shift, at + 1, count));
  }
  KVK_DEVICE static float load_one(const float* logs, int64_t stride, int shift, int64_t at, int64_t count) {
    if (logs == nullptr || at >= count || at < shift) return 0.0f;
    const float log = logs[(at - shift) * stride];
    // exp(-200) is 0 in fp32 as is exp(-inf), of which no differences could be taken. NaN stays.
    return log < -200.0f ? -200.0f : log;
  }

 private:
  KVK_DEVICE float high(int i) const { return memory_[i]; }
  KVK_DEVICE float low(int i) const { return memory_[kChunk + i]; }

  KVK_DEVICE void write(int i, double sum, double total) const {
    const float high = static_cast<float>(sum);
    memory_[i] = high;
    memory_[kChunk + i] = static_cast<float>(sum - static_cast<double>(high));
    memory_[2 * kChunk + i] = expf(high);
    memory_[3 * kChunk + i] = expf(static_cast<float>(total - sum));
  }
  float* memory_;
};

// Starts the copies of a chunk's rows to shared memory: those before token `count`, their elements before `used`; zeros
// elsewhere. All threads of the block.
template <int kColumns, int kPitch, class T>
KVK_DEVICE void copy_chunk(T* to, const T* from, int64_t token_stride, int64_t first, int64_t count, int used) {
  constexpr int kPieces = kColumns / 8;
  KVK_NO_UNROLL
  for (int i = threadIdx.x; i < LightningShape::kChunk * kPieces; i += LightningShape::kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool valid = first + row < count && piece * 8 < used;
    ptx::cp_async<16>(to + row * kPitch + piece * 8, from + (valid ? (first + row) * token_stride + piece * 8 : 0),
                      valid);
  }
}

// One head of one sequence.
struct LightningItem {
  int64_t sequence, batch, head, first, tokens;
  int column;  // the block's first one of v

  // False: the block has the tokens behind the last sequence.
  KVK_DEVICE bool find(const SequenceStarts& p, int num_heads, int dv) {
    const int tiles = ceil_div(dv, LightningShape::kColumns);
    const int64_t row = int64_t{blockIdx.x} / tiles;
    column = static_cast<int>(blockIdx.x % tiles) * LightningShape::kColumns;
    sequence = row / num_heads;
    head = row % num_heads;
    batch = p.starts == nullptr ? sequence : 0;
    first = p.starts == nullptr ? 0 : p.start(sequence);
    const bool owned = sequence < p.num_sequences;
    int64_t end = p.starts == nullptr || !owned ? p.num_tokens : p.start(sequence + 1);
    if (end < first) end = first;
    tokens = end - first;
    if (p.reversed) first = p.num_tokens - end;
    return owned;
  }

  // Element 0 of the first token.
  template <class T>
  KVK_DEVICE T* rows(const SequenceView& view) const {
    return static_cast<T*>(view.data) + batch * view.batch_stride + first * view.token_stride + head * view.head_stride;
  }
  KVK_DEVICE float* state(const StateView& view) const {
    return view.data == nullptr ? nullptr : view.data + sequence * view.slot_stride + head * view.head_stride;
  }
};

static_assert(sizeof(LightningItem) == LightningShape::kItemBytes);

}  // namespace kvk::device
