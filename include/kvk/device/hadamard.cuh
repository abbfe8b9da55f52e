// The Hadamard transform of rows: out = scale * H x. Sums have the order of docs/hadamard.md, so results are the CPU's bits.
//
// Bytes: every element once in and once out. Adds per element: log2 of the chunk, and m. Bound by memory: at 8 elements a lane
// the exchange between lanes takes half a shuffle an element and stride, at 128 elements a row some 60% of what an H100's
// shuffles allow at its bandwidth; from m = 20 on by the adds.
// Tile: up to 256 elements, a power of two: 8 a lane, exchanged by shuffles, no shared memory. Longer rows: a block takes one
// (short ones: several), passes of radix 8 over shared memory, then columns of m chunks in registers. Rows of over 96 KiB in
// floats come in two parts, the first of which waits in registers.
#pragma once

#include "kvk/device/hadamard_matrix.cuh"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

namespace kvk::device {

// kCount consecutive elements of a row; `vectors`: 8 elements lie on a multiple of 16 bytes.
template <int kCount, class T>
KVK_DEVICE void load_elements(const T* from, bool vectors, float (&x)[kCount]) {
  if constexpr (kCount == 8) {
    if (vectors) {
      if constexpr (sizeof(T) == 4) {
        KVK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Words<4> words = load_words<4>(from + half * 4);
          KVK_UNROLL
          for (int i = 0; i < 4; ++i) x[half * 4 + i] = __uint_as_float(words.w[i]);
        }
      } else {
        unpack<T>(load_words<4>(from), x);
      }
      return;
    }
  }
  KVK_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = to_float(from[i]);
}

template <int kCount, class T>
KVK_DEVICE void store_elements(T* to, bool vectors, const float (&x)[kCount]) {
  if constexpr (kCount == 8) {
    if (vectors) {
      if constexpr (sizeof(T) == 4) {
        KVK_UNROLL
        for (int half = 0; half < 2; ++half) {
          store_words<4>(to + half * 4, {{__float_as_uint(x[half * 4]), __float_as_uint(x[half * 4 + 1]),
                                          __float_as_uint(x[half * 4 + 2]), __float_as_uint(x[half * 4 + 3])}});
        }
      } else {
        store_words<4>(to, {{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])}});
      }
      return;
    }
  }
  KVK_UNROLL
  for (int i = 0; i < kCount; ++i) to[i] = from_float<T>(x[i]);
}

// Sums of strides 1, 2, .. below kCount in registers.
template <int kCount>
KVK_DEVICE void butterflies(float (&x)[kCount]) {
  KVK_UNROLL
  for (int stride = 1; stride < kCount; stride *= 2) {
    KVK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}

// Sums between lanes, of strides kCount, 2 * kCount, .. below kCount * kLanes. All lanes of the warp take part.
template <int kLanes, int kCount>
KVK_DEVICE void lane_butterflies(float (&x)[kCount]) {
  KVK_UNROLL
  for (int step = 1; step < kLanes; step *= 2) {
    const bool upper = threadIdx.x & step;
    KVK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], step);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
}

// Rows of kDim (a multiple of 8 up to 256) held by a warp, 8 consecutive elements a lane: lanes r * kLanes + u of row r.
template <int kDim>
struct WarpRows {
  static constexpr int kOrder = hadamard_order(kDim), kChunk = kOrder > 0 ? kDim / kOrder : 0;
  static constexpr int kLanes = kDim / 8, kRows = 32 / kLanes;
  static constexpr int kScratch = kOrder > 1 ? kRows * kDim : 1;  // floats of shared memory, of one warp

  // x = H x / sqrt(kDim), or H^T x / sqrt(kDim), of every row. All lanes of the warp; those beyond the last row hold anything.
  template <bool kTranspose>
  KVK_DEVICE static void rotate(float (&x)[8], float scale, float* scratch) {
    static_assert(kOrder > 0);
    const int lane = threadIdx.x % 32;
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], scale);  // not fused into the sums
    if constexpr (kChunk >= 8) {
      butterflies(x);
      lane_butterflies<kChunk / 8>(x);
    } else {
      KVK_UNROLL
      for (int first = 0; first < 8; first += kChunk) {
        float part[kChunk];
        KVK_UNROLL
        for (int i = 0; i < kChunk; ++i) part[i] = x[first + i];
        butterflies(part);
        KVK_UNROLL
        for (int i = 0; i < kChunk; ++i) x[first + i] = part[i];
      }
    }
    if constexpr (kOrder > 1) {
      __syncwarp();  // the scratch of an earlier call has been read
      if (lane < kRows * kLanes) store_elements(scratch + lane * 8, true, x);
      __syncwarp();
      for (int i = lane; i < kRows * kChunk; i += 32) {
        float* column = scratch + i / kChunk * kDim + i % kChunk;
        float values[kOrder];
        KVK_UNROLL
        for (int j = 0; j < kOrder; ++j) values[j] = column[j * kChunk];
        multiply_column<kOrder, kTranspose>(values, [&](int j, float sum) { column[j * kChunk] = sum; });
      }
      __syncwarp();
      if (lane < kRows * kLanes) load_elements(scratch + lane * 8, true, x);
    }
  }
};

// The scratch of a warp that rotates rows; four warps a block.
template <int kRotated>
KVK_DEVICE float* rotation_scratch() {
  if constexpr (kRotated > 0) {
    KVK_SHARED(scratch, float[4][WarpRows<kRotated>::kScratch]);
    return scratch[threadIdx.x / 32];
  } else {
    return nullptr;
  }
}

template <class Config>
class HadamardBlock {
 public:
  using T = typename Config::T;
  static constexpr HadamardShape kShape = Config::kShape;
  static constexpr int kPer = kShape.per, kChunk = kShape.chunk, kOrder = kShape.order;
  static constexpr int kUnits = kShape.part() / kPer;  // of one row and part

  KVK_DEVICE explicit HadamardBlock(const HadamardParams& params) : p_(params) {}

  // Rows that lanes hold.
  KVK_DEVICE void run_flat() const {
    const int64_t units = p_.num_rows * kUnits;
    for (int64_t first = int64_t{blockIdx.x} * kShape.threads; first < units;
         first += int64_t{gridDim.x} * kShape.threads) {
      const int64_t unit = first + threadIdx.x, row = unit / kUnits;
      const int column = static_cast<int>(unit % kUnits) * kPer;
      const bool valid = unit < units;
      float x[kPer] = {};
      first_sums(valid, row, column, x);
      if (valid) store_elements(out(row) + column, p_.vectors, x);
    }
  }

  KVK_DEVICE void run() {
    SmemCarver carve;
    values_ = carve.take<float>(size_t(kShape.rows) * kShape.part());
    for (int64_t first = int64_t{blockIdx.x} * kShape.rows; first < p_.num_rows;
         first += int64_t{gridDim.x} * kShape.rows) {
      const int64_t left = p_.num_rows - first;
      rows_ = left < kShape.rows ? static_cast<int>(left) : kShape.rows;
      if constexpr (kShape.parts == 1) {
        load_part(first, 0);
        if constexpr (kOrder == 1) {
          passes<kShape.reach>(first);
        } else {
          passes<kShape.reach>(first);
          columns(first);
        }
      } else {
        two_parts(first);
      }
      __syncthreads();  // the next rows take the place of these
    }
  }

 private:
  KVK_DEVICE T* out(int64_t row) const { return static_cast<T*>(p_.out) + p_.out_rows.offset(row); }

  // Loads a unit and sums what its lanes can. All lanes of the warp take part.
  KVK_DEVICE void first_sums(bool valid, int64_t row, int column, float (&x)[kPer]) const {
    if (valid) load_elements(static_cast<const T*>(p_.x) + p_.x_rows.offset(row) + column, p_.vectors, x);
    KVK_UNROLL
    for (int i = 0; i < kPer; ++i) x[i] = __fmul_rn(x[i], p_.scale);  // not fused into the sums
    butterflies(x);
    lane_butterflies<kShape.reach / kPer>(x);
  }

  // Elements [part * kShape.part(), ..) of every row, summed below kReach, into shared memory.
  KVK_DEVICE void load_part(int64_t first_row, int part) {
    constexpr int kTotal = kShape.rows * kUnits;
    for (int first = 0; first < kTotal; first += kShape.threads) {
      const int unit = first + threadIdx.x, row = unit / kUnits, column = unit % kUnits * kPer;
      const bool valid = row < rows_ && unit < kTotal;
      float x[kPer] = {};
      first_sums(valid, first_row + row, part * kShape.part() + column, x);
      if (valid) store_elements(values_ + unit * kPer, true, x);
    }
    __syncthreads();
  }

  // Sums of strides kStride and up, radix 8 at a time; without a matrix to follow, the last ones go to `out`.
  template <int kStride>
  KVK_DEVICE void passes(int64_t first_row) {
    if constexpr (kStride < kChunk) {
      constexpr int kRadix = kChunk / kStride < 8 ? kChunk / kStride : 8, kNext = kStride * kRadix;
      constexpr bool kLast = kNext == kChunk && kOrder == 1;
      constexpr int kColumns = kShape.part() / kRadix;  // of one row
      for (int i = threadIdx.x; i < rows_ * kColumns; i += kShape.threads) {
        const int row = i / kColumns, c = i % kColumns;
        const int at = c / kStride * kNext + c % kStride;
        float x[kRadix];
        KVK_UNROLL
        for (int e = 0; e < kRadix; ++e) x[e] = values_[row * kShape.part() + at + e * kStride];
        butterflies(x);
        T* to = kLast ? out(first_row + row) + at : nullptr;
        KVK_UNROLL
        for (int e = 0; e < kRadix; ++e) {
          if constexpr (kLast) {
            to[e * kStride] = from_float<T>(x[e]);
          } else {
            values_[row * kShape.part() + at + e * kStride] = x[e];
          }
        }
      }
      if constexpr (!kLast) __syncthreads();
      passes<kNext>(first_row);
    }
  }

  // The matrix, a column of every chunk at a time.
  KVK_DEVICE void columns(int64_t first_row) const {
    for (int i = threadIdx.x; i < rows_ * kChunk; i += kShape.threads) {
      const int row = i / kChunk, c = i % kChunk;
      float x[kOrder];
      KVK_UNROLL
      for (int j = 0; j < kOrder; ++j) x[j] = values_[row * kShape.n + j * kChunk + c];
      T* to = out(first_row + row) + c;
      multiply_column<kOrder, Config::kTranspose>(x, [&](int j, float sum) { to[j * kChunk] = from_float<T>(sum); });
    }
  }

  // A row that shared memory holds half of.
  KVK_DEVICE void two_parts(int64_t row) {
    constexpr int kHalf = kOrder / 2, kMine = kChunk / kShape.threads;  // columns of a thread
    static_assert(kOrder % 2 == 0 && kMine * kShape.threads == kChunk);
    float x[kMine][kOrder];
    KVK_UNROLL
    for (int part = 0; part < 2; ++part) {
      load_part(row, part);
      passes<kShape.reach>(row);
      KVK_UNROLL
      for (int m = 0; m < kMine; ++m) {
        KVK_UNROLL
        for (int j = 0; j < kHalf; ++j) {
          x[m][part * kHalf + j] = values_[j * kChunk + m * kShape.threads + threadIdx.x];
        }
      }
      __syncthreads();  // the second part takes the place of the first
    }
    KVK_UNROLL
    for (int m = 0; m < kMine; ++m) {
      T* to = out(row) + m * kShape.threads + threadIdx.x;
      multiply_column<kOrder, Config::kTranspose>(x[m], [&](int j, float sum) { to[j * kChunk] = from_float<T>(sum); });
    }
  }

  const HadamardParams& p_;
  float* values_ = nullptr;
  int rows_ = 0;
};

template <class Config>
KVK_KERNEL(Config::kShape.threads, 1)
hadamard_kernel(const __grid_constant__ HadamardParams params) {
  if constexpr (Config::kShape.flat()) {
    HadamardBlock<Config>(params).run_flat();
  } else {
    HadamardBlock<Config>(params).run();
  }
}

}  // namespace kvk::device
