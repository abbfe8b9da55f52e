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
static_assert(kPanelRows % kBlockRows == 0 && kPad % kPanelWidth == 0);

// C[r][0..kPanelWidth) = (C[r] * scale[r] +) sum over i < depth of A[r][i] * panel[i][0..kPanelWidth).
template <int Rows, bool Accumulate>
inline void multiply_block(const float* a, int lda, const float* panel, int depth, float* c, int ldc,
                           const float* scale) {
  V acc[Rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Accumulate) {
      acc[r][0] = load(c + r * ldc) * scale[r];
      acc[r][1] = load(c + r * ldc + W) * scale[r];
    } else {
      acc[r][0] = 0.0f;
      acc[r][1] = 0.0f;
    }
  }
  for (int i = 0; i < depth; ++i) {
    const V b0 = load(panel + i * kPanelWidth);
    const V b1 = load(panel + i * kPanelWidth + W);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const V x = a[r * lda + i];
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store(acc[r][0], c + r * ldc);
    store(acc[r][1], c + r * ldc + W);
  }
}

// The same for all rows (a multiple of kBlockRows) and `panels` panels side by side in C.
template <bool Accumulate>
inline void multiply_panels(const float* a, int lda, int rows, const float* b, int panels, int64_t panel_stride,
                            int depth, float* c, int ldc, const float* scale) {
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < rows; r += kBlockRows) {
      multiply_block<kBlockRows, Accumulate>(a + r * lda, lda, b + p * panel_stride, depth, c + r * ldc + p * kPanelWidth,
                                             ldc, Accumulate ? scale + r : nullptr);
    }
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
