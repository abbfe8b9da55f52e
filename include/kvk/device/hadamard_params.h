// Parameters and shape of the Hadamard kernel, and the matrices there are; for the launch code and the kernels.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

inline constexpr int64_t kMaxHadamard = 32768;

// The m of n = m * 2**k with m in {1, 12, 20, 28, 40}, the largest where several fit; 0 where none does.
KVK_HOST_DEVICE constexpr int hadamard_order(int64_t n) {
  if (n < 1 || n > kMaxHadamard) return 0;
  const int orders[] = {40, 28, 20, 12, 1};
  for (const int m : orders) {
    if (n % m == 0 && (n / m & (n / m - 1)) == 0) return m;
  }
  return 0;
}

// Rows of the last dimension: row i is at index (i / (shape[1] * shape[2] ..), .., i % shape[ndim - 1]) of the others.
struct RowGrid {
  static constexpr int kMaxDims = 5;
  int32_t ndim;  // 0: one row
  int64_t shape[kMaxDims], stride[kMaxDims];

  KVK_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = ndim - 1; d > 0; --d) {
      at += row % shape[d] * stride[d];
      row /= shape[d];
    }
    return ndim > 0 ? at + row * stride[0] : at;
  }
};

struct HadamardParams {
  const void* x;  // rows of n elements
  void* out;      // the same; x itself or apart from it
  RowGrid x_rows, out_rows;
  int64_t num_rows;
  float scale;
  bool vectors;  // every row starts on a multiple of 16 bytes
};

// How rows of n elements are cut. A thread first takes `per` consecutive elements, and a warp's lanes exchange theirs: sums of
// strides below `reach`. Longer ones, and the m x m matrix, go through shared memory.
struct HadamardShape {
  static constexpr int kFlatThreads = 256;
  static constexpr int kMostShared = 24576;  // floats: 96 KiB, which every card gives a block

  int n, order, chunk;  // n = order * chunk; order 2 for rows too long for shared memory, whose halves come one by one
  int per, reach, parts;
  int rows, threads;  // of a block

  KVK_HOST_DEVICE constexpr explicit HadamardShape(int length)
      : n(length), order(hadamard_order(length)), chunk(0), per(0), reach(0), parts(length > kMostShared ? 2 : 1),
        rows(1), threads(kFlatThreads) {
    if (parts == 2 && order == 1) order = 2;
    chunk = n / order;
    per = chunk < 8 ? chunk : 8;
    reach = chunk < 32 * per ? chunk : 32 * per;
    if (flat()) return;
    rows = n < 4096 ? 4096 / n : 1;
    // The columns of 28 or 40 chunks are held in registers, and those of the longest rows by as many threads as there are.
    threads = n < 8192 ? 256 : parts == 1 && (n < 16384 || order > 1) ? 512 : 1024;
  }

  // Rows that a warp's lanes hold: no shared memory.
  KVK_HOST_DEVICE constexpr bool flat() const { return order == 1 && reach == chunk; }
  KVK_HOST_DEVICE constexpr int part() const { return n / parts; }
  KVK_HOST_DEVICE constexpr size_t shared_bytes() const { return flat() ? 0 : sizeof(float) * size_t(rows) * part(); }
};

template <class T_, int kLength_, bool kTranspose_>
struct HadamardConfig {
  using T = T_;
  static constexpr int kLength = kLength_;
  static constexpr bool kTranspose = kTranspose_;
  static constexpr HadamardShape kShape = HadamardShape(kLength_);
};

}  // namespace kvk::device
