// The matrices H_m of docs/hadamard.md, m in {12, 20, 28, 40}: sums of a column of m chunks, in the order that fixes their
// bits. Signs are compile-time constants, so a sum is m additions.
#pragma once

#include "kvk/device/hadamard_params.h"
#include "kvk/device/lang.h"

namespace kvk::device {

// Which matrix: its order, and for 20 which of two.
struct HadamardMatrix {
  int order;
  bool of_40;  // the 20 x 20 matrix whose two-fold is H_40

  KVK_HOST_DEVICE static constexpr bool is_square(int x, int prime) {
    for (int i = 1; i < prime; ++i) {
      if (i * i % prime == x) return true;
    }
    return false;
  }
  KVK_HOST_DEVICE constexpr bool is_plus(int i, int j) const {
    if (of_40) {  // Paley's first over 19
      return j == 0 || (i != 0 && !is_square((j - i + 19) % 19, 19));
    }
    if (order == 12) {  // Paley's second over 5
      const int bi = i / 2, bj = j / 2;
      if (bi == bj) return i % 2 == 0 && j % 2 == 0;
      const bool plus = bi == 0 || bj == 0 || is_square((bj - bi + 5) % 5, 5);
      return plus != (i % 2 == 1 && j % 2 == 1);
    }
    // Williamson's array. Bit c of a circulant: column c of its first row is +.
    const int circulants[2][4] = {{0b00001, 0b00001, 0b10011, 0b01101}, {0b0000001, 0b1000011, 0b0100101, 0b0011001}};
    const int minus[4] = {0b0000, 0b0101, 0b1001, 0b0011};  // blocks of a row of blocks, bit by bit
    const int size = order / 4, bi = i / size, bj = j / size;
    const bool plus = circulants[order == 28][bi ^ bj] >> ((j % size - i % size + size) % size) & 1;
    return plus != (minus[bi] >> bj & 1);
  }
  // Bit j: element j of this row is -1.
  KVK_HOST_DEVICE constexpr uint32_t minus_signs(int row, bool transpose) const {
    uint32_t signs = 0;
    for (int j = 0; j < order; ++j) {
      const bool plus = transpose ? is_plus(j, row) : is_plus(row, j);
      signs |= uint32_t{!plus} << j;
    }
    return signs;
  }
};

// emit(i, sum) for rows kRow and up of the matrix times x.
template <int kOrder, bool kOf40, bool kTranspose, int kRow = 0, class Emit>
KVK_DEVICE void multiply_signs(const float* x, Emit&& emit) {
  constexpr uint32_t kMinus = HadamardMatrix{kOrder, kOf40}.minus_signs(kRow, kTranspose);
  float sum = 0.0f;
  KVK_UNROLL
  for (int j = 0; j < kOrder; ++j) sum = kMinus >> j & 1 ? sum - x[j] : sum + x[j];
  emit(kRow, sum);
  if constexpr (kRow + 1 < kOrder) multiply_signs<kOrder, kOf40, kTranspose, kRow + 1>(x, emit);
}

// emit(i, element i of H_m x), for m = kOrder; also 1, and 2 for the two halves of a row.
template <int kOrder, bool kTranspose, class Emit>
KVK_DEVICE void multiply_column(float (&x)[kOrder], Emit&& emit) {
  if constexpr (kOrder == 1) {
    emit(0, x[0]);
  } else if constexpr (kOrder == 2) {
    emit(0, x[0] + x[1]);
    emit(1, x[0] - x[1]);
  } else if constexpr (kOrder == 40) {
    KVK_UNROLL
    for (int j = 0; j < 20; ++j) {
      const float a = x[j], b = x[j + 20];
      x[j] = a + b;
      x[j + 20] = a - b;
    }
    multiply_signs<20, true, kTranspose>(x, emit);
    multiply_signs<20, true, kTranspose>(x + 20, [&](int i, float sum) { emit(i + 20, sum); });
  } else {
    multiply_signs<kOrder, false, kTranspose>(x, emit);
  }
}

}  // namespace kvk::device
