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

// One register block: C[r][0..kPanelWidth) from the sum over i < depth of A(r, i) * B[i][0..kPanelWidth), where A(r, i) is
// a[r * lda + i], or a[i * lda + r] of a transposed A.
template <Into kInto, bool kTransposed = false, int kRows = kBlockRows>
inline void multiply_block(const float* a, int lda, const float* b, int ldb, int depth, float* c, int ldc,
                           const float* scale) {
  V acc[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = 0.0f;
    acc[r][1] = 0.0f;
  }
  for (int i = 0; i < depth; ++i) {
    const V b0 = load(b + i * ldb);
    const V b1 = load(b + i * ldb + W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = kTransposed ? a[i * lda + r] : a[r * lda + i];
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  // C joins at the end: started with, it would stretch the chain of roundings over all pieces.
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
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
[[gnu::noinline]] inline void multiply_scores(const float* a, int lda, int rows, const float* b, int panels,
                                              int head_dim, float* s, int lds) {
  constexpr int kPiece = 16;
  for (int p = 0; p < panels; ++p) {
    const float* panel = b + int64_t{p} * head_dim * kPanelWidth;
    for (int r = 0; r < rows; r += kBlockRows) {
      float* c = s + r * lds + p * kPanelWidth;
      multiply_block<Into::kSet>(a + r * lda, lda, panel, kPanelWidth, std::min(kPiece, head_dim), c, lds, nullptr);
      for (int d = kPiece; d < head_dim; d += kPiece) {
        multiply_block<Into::kAdd>(a + r * lda + d, lda, panel + d * kPanelWidth, kPanelWidth,
                                   std::min(kPiece, head_dim - d), c, lds, nullptr);
      }
    }
  }
}

// out[r] = out[r] * scale[r] + weights[r] . values, `keys` of them.
[[gnu::noinline]] inline void multiply_values(const float* weights, int rows, const float* values, int panels, int keys,
                                              float* out, int ldo, const float* scale) {
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < rows; r += kBlockRows) {
      multiply_block<Into::kScaleAdd>(weights + r * kBlockKeys, kBlockKeys, values + p * kValuePanel, kPanelWidth, keys,
                                      out + r * ldo + p * kPanelWidth, ldo, scale + r);
    }
  }
}

// `rows` of one panel of C, in blocks of kRows and one smaller at the end. An odd last row takes the one behind along, in A
// and in C.
template <Into kInto, bool kTransposed, int kRows = kBlockRows>
inline void multiply_rows(const float* a, int lda, const float* b, int ldb, int rows, int depth, float* c, int ldc,
                          const float* scale) {
  static_assert(kRows % 2 == 0);
  for (; rows >= kRows || (kRows == 2 && rows > 0); rows -= kRows) {
    multiply_block<kInto, kTransposed, kRows>(a, lda, b, ldb, depth, c, ldc, scale);
    a += kTransposed ? kRows : kRows * lda;
    c += kRows * ldc;
  }
  if constexpr (kRows > 2) {
    if (rows > 0) multiply_rows<kInto, kTransposed, kRows - 2>(a, lda, b, ldb, rows, depth, c, ldc, scale);
  }
}

// C [rows, cols] from A [rows, depth] and B [depth, cols], row by row in memory; cols in whole panels. For kScaleAdd all
// of C has one scale. What a row of C becomes does not depend on which others are computed.
template <Into kInto, bool kTransposed = false>
inline void multiply(const float* a, int lda, const float* b, int ldb, int rows, int cols, int depth, float* c, int ldc,
                     float scale = 1.0f) {
  float scales[kBlockRows];
  std::fill_n(scales, kBlockRows, scale);
  for (int p = 0; p < cols; p += kPanelWidth) {
    multiply_rows<kInto, kTransposed>(a, lda, b + p, ldb, rows, depth, c + p, ldc, scales);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
