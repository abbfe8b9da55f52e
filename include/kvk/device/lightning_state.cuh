// A warp's part of a state, and products of a chunk's rows with it and with each other.
#pragma once

#include "kvk/device/lightning_chunk.cuh"

namespace kvk::device {

// 16 columns of the state of one head, transposed, in registers: S^T [16, Dk] as an mma accumulator, which is also the first
// factor of S^T X^T.
template <class T, int kDim, int kPitch>
class WarpState {
 public:
  static constexpr int kChunk = LightningShape::kChunk, kValuePitch = LightningShape::kValuePitch;
  static constexpr int kInputParts = lightning_parts(kSameType<T, bf16>), kParts = 3;  // three parts: as exact as fp32
  using Columns = float[kChunk / 8][4];  // [16, C], of the state's columns and the tokens of a chunk
  using Fragment = float[4];             // 16 columns and 8 rows of the state

  // to += S^T X^T for rows x of a chunk, with S as kOrder parts.
  template <int kOrder>
  KVK_DEVICE void read(const T* x, Columns& to) const {
    KVK_UNROLL
    for (int n = 0; n < kDim / 8; n += 2) read_step<kOrder>(state_[n], state_[n + 1], x + n * 8, to);
  }
  // The products with 16 rows of a state, whose channels x starts at.
  template <int kOrder>
  KVK_DEVICE static void read_step(const Fragment& low, const Fragment& high, const T* x, Columns& to) {
    uint32_t a[kOrder][4];
    KVK_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[kOrder];
      const Fragment& s = i < 2 ? low : high;
      split_bf16(s[i % 2 * 2], s[i % 2 * 2 + 1], parts);
      KVK_UNROLL
      for (int part = 0; part < kOrder; ++part) a[part][i] = parts[part];
    }
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; n += 2) {
      uint32_t words[4], b[kInputParts][4];
      ptx::ldmatrix(words, x + (n * 8 + lane() % 8 + lane() / 16 * 8) * kPitch + lane() / 8 % 2 * 8);
      split_words<T>(words, b);
      mma_parts<kOrder>(to[n], a, b, 0);
      mma_parts<kOrder>(to[n + 1], a, b, 2);
    }
  }

  // S^T = whole * S^T + (weighted V)^T K, weight(token) of a chunk's values, this warp's columns of which are v.
  template <class Weight>
  KVK_DEVICE void add(const T* v, const T* k, float whole, Weight&& weight) {
    KVK_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) state_[n][i] *= whole;
    }
    KVK_NO_UNROLL
    for (int step = 0; step < kChunk / 16; ++step) {
      uint32_t values[4], a[kParts][4];
      load_values(v, step, values);
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int token = step * 16 + i / 2 * 8 + lane() % 4 * 2;
        const float2 pair = unpack2<T>(values[i]);
        uint32_t parts[kParts];
        split_bf16(pair.x * weight(token), pair.y * weight(token + 1), parts);
        KVK_UNROLL
        for (int part = 0; part < kParts; ++part) a[part][i] = parts[part];
      }
      KVK_UNROLL
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t words[4], b[kInputParts][4];
        ptx::ldmatrix_trans(words, k + (step * 16 + lane() % 16) * kPitch + (n + lane() / 16) * 8);
        split_words<T>(words, b);
        mma_parts<kParts>(state_[n], a, b, 0);
        mma_parts<kParts>(state_[n + 1], a, b, 2);
      }
    }
  }

  // This warp's columns of V^T at 16 tokens, as the first factor of a product.
  KVK_DEVICE static void load_values(const T* v, int step, uint32_t (&words)[4]) {
    ptx::ldmatrix_trans(words, v + (step * 16 + lane() / 16 * 8 + lane() % 8) * kValuePitch + lane() / 8 % 2 * 8);
  }

  KVK_DEVICE const Fragment& fragment(int n) const { return state_[n]; }

  // The columns from `column` on of a matrix [dk, dv] in memory.
  KVK_DEVICE void load(const float* from, const StateView& view, int dk, int dv, int column) {
    if (from == nullptr) return;
    each(dk, dv, column, [&](float& s, int row, int at) { s = from[row * view.row_stride + at * view.column_stride]; });
  }
  KVK_DEVICE void store(float* to, const StateView& view, int dk, int dv, int column, float factor) {
    if (to == nullptr) return;
    each(dk, dv, column,
         [&](float& s, int row, int at) { to[row * view.row_stride + at * view.column_stride] = s * factor; });
  }

 private:
  // Not kept: a register more than it costs to ask again.
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }

  // Of this lane's elements of S^T: call(element, row of S, column of S), those inside.
  template <class Call>
  KVK_DEVICE void each(int dk, int dv, int first, Call&& call) {
    KVK_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = n * 8 + lane() % 4 * 2 + i % 2, column = first + lane() / 4 + i / 2 * 8;
        if (row < dk && column < dv) call(state_[n][i], row, column);
      }
      if (n % 4 == 3) __syncwarp();  // keeps the compiler from having all addresses at a time
    }
  }

  float state_[kDim / 8][4] = {};
};

// s += X Y^T of 16 rows from `i` and 16 from `j` on, as two accumulators beside each other.
template <int kDim, int kPitch, class T>
KVK_DEVICE void multiply_rows(const T* x, const T* y, int i, int j, float (&s)[2][4]) {
  const int lane = threadIdx.x % 32;
  KVK_NO_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4], b[4];
    ptx::ldmatrix(a, x + (i + lane % 16) * kPitch + (step * 2 + lane / 16) * 8);
    ptx::ldmatrix(b, y + (j + lane % 8 + lane / 16 * 8) * kPitch + (step * 2 + lane / 8 % 2) * 8);
    ptx::mma_m16n8k16<T>(s[0], a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(s[1], a, b[2], b[3]);
  }
}

// The blocks of 16 x 16 tokens of a chunk at and below the diagonal: call(first row, first column), in turns of the warps.
template <class Call>
KVK_DEVICE void each_block_of_triangle(Call&& call) {
  constexpr int kBlocks = LightningShape::kChunk / 16;
  KVK_NO_UNROLL
  for (int block = threadIdx.x / 32; block < kBlocks * (kBlocks + 1) / 2; block += LightningShape::kWarps) {
    const int row = block < 1 ? 0 : block < 3 ? 1 : block < 6 ? 2 : 3;
    call(row * 16, (block - row * (row + 1) / 2) * 16);
  }
}

}  // namespace kvk::device
