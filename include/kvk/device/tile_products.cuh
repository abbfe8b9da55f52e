// Products of a warp's rows with a tile of keys in shared memory, both ways around: rows . keys^T, and weights . keys.
//
// Rows are tiles of 16, keys tiles of 8; results are mma accumulators (ptx_mma.h).
#pragma once

#include "kvk/device/ptx.h"
#include "kvk/device/types.h"

namespace kvk::device {

// s += rows . keys^T. The rows are kTerms matrices, kTermElements apart, that stand for their sum; edit(i, n, b) may change
// the fragment b of keys 8 n to 8 n + 15 before product i = step * kTerms + term takes it.
template <int kDim, int kPitch, int kTerms, int kTermElements, class T, int kRowTiles, int kKeyTiles, class Edit>
KVK_DEVICE void add_products(const T* rows, const T* keys, float (&s)[kRowTiles][kKeyTiles][4], Edit&& edit) {
  const int lane = threadIdx.x % 32;
  KVK_NO_UNROLL
  for (int i = 0; i < kDim / 16 * kTerms; ++i) {
    const int step = i / kTerms;
    const T* from = rows + i % kTerms * kTermElements;
    uint32_t a[kRowTiles][4];
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      ptx::ldmatrix(a[tile], from + (tile * 16 + lane % 16) * kPitch + (step * 2 + lane / 16) * 8);
    }
    KVK_UNROLL
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix(b, keys + (n * 8 + lane % 8 + lane / 16 * 8) * kPitch + (step * 2 + lane / 8 % 2) * 8);
      edit(i, n, b);
      KVK_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        ptx::mma_m16n8k16<T>(s[tile][n], a[tile], b[0], b[1]);
        ptx::mma_m16n8k16<T>(s[tile][n + 1], a[tile], b[2], b[3]);
      }
    }
  }
}
template <int kDim, int kPitch, class T, int kRowTiles, int kKeyTiles>
KVK_DEVICE void add_products(const T* rows, const T* keys, float (&s)[kRowTiles][kKeyTiles][4]) {
  add_products<kDim, kPitch, 1, 0>(rows, keys, s, [](int, int, uint32_t (&)[4]) {});
}

// out += weights . values, the weights rounded to T.
template <int kPitch, class T, int kRowTiles, int kKeyTiles, int kColumnTiles>
KVK_DEVICE void add_weighted(const float (&s)[kRowTiles][kKeyTiles][4], const T* values,
                             float (&out)[kRowTiles][kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  KVK_UNROLL
  for (int step = 0; step < kKeyTiles / 2; ++step) {
    uint32_t a[kRowTiles][4];
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const float (&left)[4] = s[tile][step * 2];
      const float (&right)[4] = s[tile][step * 2 + 1];
      a[tile][0] = pack2<T>(left[0], left[1]);
      a[tile][1] = pack2<T>(left[2], left[3]);
      a[tile][2] = pack2<T>(right[0], right[1]);
      a[tile][3] = pack2<T>(right[2], right[3]);
    }
    KVK_UNROLL
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, values + (step * 16 + lane % 16) * kPitch + (n + lane / 16) * 8);
      KVK_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        ptx::mma_m16n8k16<T>(out[tile][n], a[tile], b[0], b[1]);
        ptx::mma_m16n8k16<T>(out[tile][n + 1], a[tile], b[2], b[3]);
      }
    }
  }
}

// The weight of a key that a row does not see: what no weight that is computed is.
inline constexpr float kUnseen = -0.0f;
KVK_DEVICE bool is_unseen(float weight) { return __float_as_uint(weight) == 0x80000000u; }

// The same, of keys that the row sees alone: 0 * NaN must not enter a row that does not read that key. Weight (row, key) is
// in the quad lane of that key's column.
template <int kPitch, class T, int kRowTiles, int kKeyTiles, int kColumnTiles>
KVK_DEVICE void add_weighted_seen(const float (&s)[kRowTiles][kKeyTiles][4], const T* values,
                                  float (&out)[kRowTiles][kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  KVK_UNROLL  // registers have no addresses: the tile of keys is picked at compile time
      for (int n = 0; n < kKeyTiles; ++n) {
    KVK_NO_UNROLL
    for (int column = 0; column < 8; ++column) {
      const T* from = values + (n * 8 + column) * kPitch + lane % 4 * 2;
      KVK_UNROLL
      for (int row = 0; row < kRowTiles * 2; ++row) {
        const int tile = row / 2, half = row % 2;
        const float p = __shfl_sync(0xffffffffu, column % 2 == 0 ? s[tile][n][half * 2] : s[tile][n][half * 2 + 1],
                                    (lane & ~3) + column / 2);
        if (is_unseen(p)) continue;
        KVK_UNROLL
        for (int to = 0; to < kColumnTiles; ++to) {
          out[tile][to][half * 2] += p * to_float(from[to * 8]);
          out[tile][to][half * 2 + 1] += p * to_float(from[to * 8 + 1]);
        }
      }
    }
  }
}

// Whether a warp finds neither NaN nor infinities in `rows` rows of 16-bit elements in shared memory.
template <int kColumns, int kPitch, class T>
KVK_DEVICE bool tile_is_finite(const T* tile, int rows, int lane) {
  constexpr uint32_t kExponent = kSameType<T, bf16> ? 0x7f80u : 0x7c00u;
  constexpr int kChunks = kColumns / 8;
  bool bad = false;
  for (int i = lane; i < rows * kChunks; i += 32) {
    const Words<4> words = load_words<4>(tile + i / kChunks * kPitch + i % kChunks * 8);
    KVK_UNROLL
    for (int w = 0; w < 4; ++w) {
      bad |= (words.w[w] & kExponent) == kExponent || (words.w[w] >> 16 & kExponent) == kExponent;
    }
  }
  return !__any_sync(0xffffffffu, bad);
}

// Either, by whether this lane hid a key from some row: the second is for the rare tile that holds NaN or infinities.
template <int kPitch, class T, int kRowTiles, int kKeyTiles, int kColumnTiles>
KVK_DEVICE void add_weighted(const float (&s)[kRowTiles][kKeyTiles][4], const T* values, bool hidden,
                             float (&out)[kRowTiles][kColumnTiles][4]) {
  if (__any_sync(0xffffffffu, hidden) &&
      !tile_is_finite<kColumnTiles * 8, kPitch>(values, kKeyTiles * 8, threadIdx.x % 32)) {
    add_weighted_seen<kPitch>(s, values, out);
  } else {
    add_weighted<kPitch>(s, values, out);
  }
}

// Rows of 16-bit elements to shared memory, row i of kUsed elements at from + at(i); columns up to kPadded, and rows whose
// offset is kNoRow, are filled with zeros. All threads of the block; the copies are under way when it returns.
inline constexpr int64_t kNoRow = -1;
template <int kUsed, int kPadded, int kPitch, int kThreads, class T, class At>
KVK_DEVICE void copy_rows(T* to, const void* from, int rows, At&& at) {
  constexpr int kChunks = kPadded / 8;
  KVK_NO_UNROLL
  for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t offset = at(row);
    const bool valid = offset != kNoRow && chunk * 8 < kUsed;
    ptx::cp_async<16>(to + row * kPitch + chunk * 8, static_cast<const T*>(from) + (valid ? offset + chunk * 8 : 0),
                      valid);
  }
}

}  // namespace kvk::device
