// The fp32 matrix product of panel tiles: rows of A against a packed panel of B, in register blocks.
#pragma once

#include <algorithm>

#include "cpu/plan.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// A register block is kBlockRows x kPanelWidth: as many accumulators as leave room for two vectors of B and one of A
// (16 registers: 6 x 2; 32: 12 x 2; SSE broadcasts through a register more: 4 x 2).
inline constexpr int kBlockRows = W == 16 ? 12 : W == 8 ? 6 : 4;
inline constexpr int kPanelWidth = 2 * W;
// Floats from one panel of values to the next: a line more than the panel, or all panels would share their cache sets.
inline constexpr int kValuePanel = kBlockKeys * kPanelWidth + 16;
static_assert(kPanelRowStep % kBlockRows == 0 && kPad % kPanelWidth == 0);

enum class Into { kSet, kAdd, kScaleAdd };  // C = AB, C += AB, C = C * scale + AB

// One register block: C[r][0..kPanelWidth) from the sum over i < depth of A[r][i] * panel[i][0..kPanelWidth).
template <Into kInto>
inline void multiply_block(const float* a, int lda, const float* panel, int depth, float* c, int ldc,
                           const float* scale) {
  V acc[kBlockRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r) {
    acc[r][0] = 0.0f;
    acc[r][1] = 0.0f;
  }
  for (int i = 0; i < depth; ++i) {
    const V b0 = load(panel + i * kPanelWidth);
    const V b1 = load(panel + i * kPanelWidth + W);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const V x = a[r * lda + i];
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  // C joins at the end: started with, it would stretch the chain of roundings over all pieces.
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* to = c + r * ldc + half * W;
      if constexpr (kInto == Into::kAdd) acc[r][half] += load(to);
      if constexpr (kInto == Into::kScaleAdd) acc[r][half] += load(to) * scale[r];
      store(acc[r][half], to);
    }
  }
}

// s[r][0..panels * kPanelWidth) = A[r] . panel, over head_dim. Summed 16 products at a time: one long chain of adds would
// lose more than a matrix library does (error of a score at head dim 128: 1.2e-6 rms, in pieces 5.6e-7).
inline void multiply_scores(const float* a, int lda, int rows, const float* b, int panels, int head_dim, float* s,
                            int lds) {
  constexpr int kPiece = 16;
  for (int p = 0; p < panels; ++p) {
    const float* panel = b + int64_t{p} * head_dim * kPanelWidth;
    for (int r = 0; r < rows; r += kBlockRows) {
      float* c = s + r * lds + p * kPanelWidth;
      multiply_block<Into::kSet>(a + r * lda, lda, panel, std::min(kPiece, head_dim), c, lds, nullptr);
      for (int d = kPiece; d < head_dim; d += kPiece) {
        multiply_block<Into::kAdd>(a + r * lda + d, lda, panel + d * kPanelWidth, std::min(kPiece, head_dim - d), c,
                                   lds, nullptr);
      }
    }
  }
}

// out[r] = out[r] * scale[r] + weights[r] . values, `keys` of them.
inline void multiply_values(const float* weights, int rows, const float* values, int panels, int keys, float* out,
                            int ldo, const float* scale) {
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < rows; r += kBlockRows) {
      multiply_block<Into::kScaleAdd>(weights + r * kBlockKeys, kBlockKeys, values + p * kValuePanel, keys,
                                      out + r * ldo + p * kPanelWidth, ldo, scale + r);
    }
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
