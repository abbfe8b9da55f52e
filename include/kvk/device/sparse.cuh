// Records of bitmaps from rows of numbers and back, the CPU's bytes: keys are compared as integers, elements are moved, and the
// only arithmetic is the rotation.
//
// Bytes of compressing a row of D 16-bit elements: 2 D read, 2 keep + D / 8 written, in vectors of 16.
// Operations of a warp: for each of 15 bits of a key about 24 for 256 elements, one reduction over the warp among them; then some
// 60. At head dim 128 and 50% that is 210 a row of 400 bytes, in whose time of memory an SM of an H100 issues 110: bound by
// instructions, at half of what memory allows. Of scores: 32 bits of about 30.
// Tile: a warp takes as many rows side by side as fit it at 8 channels a lane, 2 at head dim 128.
#pragma once

#include "kvk/device/hadamard.cuh"
#include "kvk/device/sparse_bits.cuh"
#include "kvk/device/sparse_params.h"

namespace kvk::device {

// Magnitudes of 8 channels, the 15 bits below the sign as integers: NaN before infinity, then the numbers. Two to a word, channel i
// and i + 4, under a bit that stays set when something not greater is taken away.
class MagnitudeKeys {
 public:
  static constexpr int kBits = 15;

  KVK_DEVICE explicit MagnitudeKeys(const Words<4>& row) {
    KVK_UNROLL
    for (int i = 0; i < 2; ++i) {
      pairs_[2 * i] = ptx::prmt(row.w[i], row.w[i + 2], 0x5410) | 0x80008000u;
      pairs_[2 * i + 1] = ptx::prmt(row.w[i], row.w[i + 2], 0x7632) | 0x80008000u;
    }
  }

  // A bit for each channel whose key is at least `key`, of up to 0x8000.
  KVK_DEVICE uint32_t at_least(uint32_t key) const {
    uint32_t bits = 0;
    KVK_UNROLL
    for (int i = 0; i < 4; ++i) bits |= ((pairs_[i] - key * 0x10001u) & 0x80008000u) >> (15 - i);
    return (bits | bits >> 12) & 0xffu;
  }
  KVK_DEVICE uint32_t above(uint32_t key) const { return at_least(key + 1); }

 private:
  uint32_t pairs_[4];
};

// Scores of 8 channels as integers of the same order: +0 is -0, NaN comes before infinity.
class ScoreKeys {
 public:
  static constexpr int kBits = 32;

  KVK_DEVICE explicit ScoreKeys(const float (&scores)[8]) {
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = scores[i] == 0.0f ? 0u : __float_as_uint(scores[i]);
      keys_[i] = is_nan(scores[i]) ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
    }
  }

  KVK_DEVICE uint32_t at_least(uint32_t key) const {
    uint32_t bits = 0;
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) bits |= uint32_t{keys_[i] >= key} << i;
    return bits;
  }
  KVK_DEVICE uint32_t above(uint32_t key) const {
    uint32_t bits = 0;
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) bits |= uint32_t{keys_[i] > key} << i;
    return bits;
  }

 private:
  uint32_t keys_[8];
};

// The sum of x, up to 255, over the lanes of each row; rows that fill a warp may have more.
template <int kLanes>
KVK_DEVICE uint32_t row_sum(uint32_t x) {
  constexpr int kRows = 32 / kLanes, kTogether = 4;  // rows, each in a byte of one number
  const int row = static_cast<int>(threadIdx.x) % 32 / kLanes;
  uint32_t sum = 0;
  KVK_UNROLL
  for (int first = 0; first < kRows; first += kTogether) {
    const bool mine = row >= first && row < first + kTogether && row < kRows;
    const int shift = mine ? (row - first) * 8 : 0;
    const uint32_t sums = __reduce_add_sync(0xffffffffu, mine ? x << shift : 0u);
    if (mine) sum = kRows == 1 ? sums : sums >> shift & 0xffu;
  }
  return sum;
}

// The lowest n set bits of a byte.
KVK_DEVICE uint32_t lowest_bits(uint32_t byte, uint32_t n) {
  uint32_t taken = 0;
  KVK_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (static_cast<uint32_t>(__popc(taken)) < n) taken |= byte & 1u << i;
  }
  return taken;
}

// Of each row the first n channels of `bits`, in their order.
template <int kLanes>
KVK_DEVICE uint32_t first_of_row(uint32_t bits, uint32_t n) {
  const uint32_t before = sum_before<kLanes>(__popc(bits));
  return lowest_bits(bits, before < n ? n - before : 0);
}

// Of each row the n channels of the largest keys, of equal ones the first: bits of this lane's 8. The n-th largest key is found bit
// by bit.
template <int kLanes, class Keys>
KVK_DEVICE uint32_t pick_largest(const Keys& keys, uint32_t n) {
  uint32_t key = 0;
  KVK_NO_UNROLL
  for (int bit = Keys::kBits - 1; bit >= 0; --bit) {
    const uint32_t higher = key | 1u << bit;
    if (row_sum<kLanes>(__popc(keys.at_least(higher))) >= n) key = higher;
  }
  const uint32_t above = keys.above(key), equal = keys.at_least(key) & ~above;
  return above | first_of_row<kLanes>(equal, n - row_sum<kLanes>(__popc(above)));
}

// 8 floats as values, each rounded as a cast does; a NaN becomes the one of that name, so that all bits are defined.
template <class T>
KVK_DEVICE Words<4> rounded(const float (&x)[8]) {
  constexpr uint32_t kQuietNaN = kSameType<T, bf16> ? 0x7fc0 : 0x7e00;
  Words<4> words;
  KVK_UNROLL
  for (int i = 0; i < 4; ++i) {
    uint32_t word = pack2<T>(x[2 * i], x[2 * i + 1]);
    if (is_nan(x[2 * i])) word = (word & 0xffff0000u) | kQuietNaN;
    if (is_nan(x[2 * i + 1])) word = (word & 0xffffu) | kQuietNaN << 16;
    words.w[i] = word;
  }
  return words;
}

// What a warp writes of the values of its rows, before it goes to memory in vectors.
struct alignas(16) KeptValues {
  static constexpr int kCount = 256;
  uint16_t values[kCount];
};

template <class Config>
class CompressWarp {
 public:
  using In = typename Config::In;
  using Value = typename Config::Value;
  static constexpr int kDim = Config::kDim, kLanes = kDim / 8, kRows = sparse_rows(kDim);

  KVK_DEVICE CompressWarp(const SparseParams& p, uint16_t* kept, float* scratch)
      : p_(p), kept_(kept), scratch_(scratch), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Rows [work * kRows, ..) of a matrix.
  KVK_DEVICE void run(int64_t matrix, int64_t work) const {
    const RecordMatrix m(p_, matrix);
    if (!m.inside()) return;
    const int64_t first = work * kRows, token = first + lane_ / kLanes;
    const bool valid = lane_ < kRows * kLanes && token < p_.tokens;
    const Words<4> row = load(m, token, valid);
    const uint32_t picked = pick(m, token, valid, row);
    uint8_t* record = m.packed(p_.records);
    store_values(record + first * p_.keep * 2, p_.tokens - first, row, picked);
    if (valid) record[p_.bitmap_offset + token * kLanes + lane_ % kLanes] = static_cast<uint8_t>(picked);
    if (work == 0) {
      const int64_t padding = p_.bitmap_offset + p_.tokens * kLanes + lane_;
      if (padding < p_.record_bytes) record[padding] = 0;
    }
  }

 private:
  // 8 elements of a row as values.
  KVK_DEVICE Words<4> load(const RecordMatrix& m, int64_t token, bool valid) const {
    const In* x = static_cast<const In*>(p_.x) + m.x_offset + token * p_.token_stride + lane_ % kLanes * 8;
    if constexpr (kSameType<In, Value> && !Config::kRotated) {
      Words<4> words = {};
      if (!valid) return words;
      if (p_.vectors) return load_words<4>(x);
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) words.w[i] = x[2 * i].bits | uint32_t{x[2 * i + 1].bits} << 16;
      return words;
    } else {
      float wide[8] = {};
      if (valid) load_elements(x, p_.vectors, wide);
      if constexpr (Config::kRotated) WarpRows<kDim>::template rotate<false>(wide, p_.rotate_scale, scratch_);
      return rounded<Value>(wide);
    }
  }

  KVK_DEVICE uint32_t pick(const RecordMatrix& m, int64_t token, bool valid, const Words<4>& row) const {
    const uint32_t keep = static_cast<uint32_t>(p_.keep);
    if constexpr (Config::kSelect == Select::magnitude) {
      return pick_largest<kLanes>(MagnitudeKeys(row), keep);
    } else {
      const int unit = lane_ % kLanes;
      const int64_t at =
          m.outer * p_.select_page_stride + token * p_.select_token_stride + m.head * p_.select_head_stride;
      if constexpr (Config::kSelect == Select::scores) {
        float scores[8] = {};
        if (valid) load_elements(static_cast<const float*>(p_.select) + at + unit * 8, p_.select_vectors, scores);
        return pick_largest<kLanes>(ScoreKeys(scores), keep);
      } else {
        const uint8_t* select = static_cast<const uint8_t*>(p_.select) + at;
        uint32_t bits = 0;
        if constexpr (Config::kSelect == Select::bitmap) {
          if (valid) bits = select[unit];
        } else {
          KVK_UNROLL
          for (int i = 0; i < 8; ++i) {
            if (valid && select[unit * 8 + i] != 0) bits |= 1u << i;
          }
        }
        return first_of_row<kLanes>(bits, keep);  // values on a card are trusted, but never write outside a row
      }
    }
  }

  // The picked values of all rows, one behind the other, and zeros where a row has fewer than it may keep.
  KVK_DEVICE void store_values(uint8_t* to, int64_t rows_left, const Words<4>& row, uint32_t picked) const {
    const uint32_t before = sum_before<kLanes>(__popc(picked));
    __syncwarp();  // the values of earlier rows have been read
    store_words<4>(kept_ + lane_ * 8, {});
    __syncwarp();  // all is cleared
    uint16_t* next = kept_ + lane_ / kLanes * p_.keep + before;
    if (lane_ < kRows * kLanes) {
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (picked >> i & 1) *next++ = static_cast<uint16_t>(row.w[i / 2] >> (i % 2 * 16));
      }
    }
    __syncwarp();  // all values are there
    const int64_t rows = rows_left < kRows ? rows_left : kRows, chunks = rows * p_.keep / 8;
    for (int64_t i = lane_; i < chunks; i += 32) store_words(to + i * 16, load_words<4>(kept_ + i * 8));
  }

  const SparseParams& p_;
  uint16_t* kept_;
  float* scratch_;
  int lane_;
};

template <class Config>
KVK_KERNEL(128, 1)
compress_kernel(const __grid_constant__ SparseParams p) {
  KVK_SHARED(kept, KeptValues[4]);
  float* scratch = rotation_scratch<Config::kRotated ? Config::kDim : 0>();
  const CompressWarp<Config> warp(p, kept[threadIdx.x / 32].values, scratch);
  const int64_t warps = sparse_warps(p.tokens, Config::kDim), total = warps * p.num_matrices;
  for (int64_t i = int64_t{blockIdx.x} * 4 + threadIdx.x / 32; i < total; i += int64_t{gridDim.x} * 4) {
    warp.run(i / warps, i % warps);
  }
}

// Rows [work * .., ..) of a matrix, as many as a warp takes.
template <class T, int kDim, bool kRotated>
KVK_DEVICE void decompress_rows(const SparseParams& p, int64_t matrix, int64_t work, float* scratch) {
  constexpr int kLanes = kDim / 8, kRows = sparse_rows(kDim);
  const RecordMatrix m(p, matrix);
  if (!m.inside()) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, unit = lane % kLanes;
  const int64_t token = work * kRows + lane / kLanes;
  const bool valid = lane < kRows * kLanes && token < p.tokens;
  const uint8_t* record = m.packed(p.records);
  const uint32_t bits = valid ? record[p.bitmap_offset + token * kLanes + unit] : 0u, count = __popc(bits);
  const uint32_t before = sum_before<kLanes>(count);
  Words<4> words = {};
  if (valid) words = put_apart(record + token * p.keep * 2, bits, count, before);
  if constexpr (kRotated) {
    float x[8];
    unpack<T>(words, x);
    WarpRows<kDim>::template rotate<true>(x, p.rotate_scale, scratch);
    words = rounded<T>(x);
  }
  if (!valid) return;
  T* to = static_cast<T*>(p.x) + m.x_offset + token * p.token_stride + unit * 8;
  if (p.vectors) return store_words(to, words);
  KVK_UNROLL
  for (int i = 0; i < 8; ++i) to[i].bits = static_cast<uint16_t>(words.w[i / 2] >> (i % 2 * 16));
}

template <class T, int kDim, bool kRotated>
KVK_KERNEL(128, 1)
decompress_kernel(const __grid_constant__ SparseParams p) {
  float* scratch = rotation_scratch<kRotated ? kDim : 0>();
  const int64_t warps = sparse_warps(p.tokens, kDim), total = warps * p.num_matrices;
  for (int64_t i = int64_t{blockIdx.x} * 4 + threadIdx.x / 32; i < total; i += int64_t{gridDim.x} * 4) {
    decompress_rows<T, kDim, kRotated>(p, i / warps, i % warps, scratch);
  }
}

}  // namespace kvk::device
