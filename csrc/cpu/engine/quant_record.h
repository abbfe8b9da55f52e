// One record of K or V: its parts, and its tokens as floats.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/engine/dense.h"
#include "cpu/simd_codes.h"
#include "kvk/quant.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kMaxDim = 256;
inline constexpr int kMaxGroups = kMaxDim / 16;  // of channels

// One record of K or V.
struct Record {
  QuantPart part;
  int dim = 0;
  int64_t row_bytes = 0;
  const uint8_t* codes = nullptr;
  const f16* scale = nullptr;
  const f16* min = nullptr;

  Record() : part{} {}
  Record(const QuantPart& p, const QuantLayout& layout, int head_dim, const uint8_t* record)
      : part(p), dim(head_dim), row_bytes(layout.row_bytes), codes(record),
        scale(reinterpret_cast<const f16*>(record + layout.scale_offset)),
        min(reinterpret_cast<const f16*>(record + layout.min_offset)) {}

  const uint8_t* row(int token) const { return codes + token * row_bytes; }
  int groups_per_row() const { return dim / part.group; }
};

// n float16 numbers, as floats.
inline void widen(const f16* from, int n, float* to) {
  int i = 0;
  for (; i + W <= n; i += W) store(load(from + i), to + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Codes of 2, 4 or 8 bits: a run of tokens of one record.
struct Codes {
  int bits;
  const uint8_t* first;
  int64_t row_bytes;

  const uint8_t* row(int token) const { return first + token * row_bytes; }
};

// f(bits of codes) as a constant.
template <class F>
inline void with_code_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 8>());
  }
}

// What is read behind the last row of codes: of a record its scales and minima.
inline constexpr int kCodesBehind = 32;
inline constexpr int kCodesTile = kBlockKeys * kMaxDim / 2 + kCodesBehind;

// How codes of 3 bits become codes of 4 bits.
enum class Raise { kNo = 0, kMiddle = 4 };  // kMiddle: level 0 stays where it was

// The codes of tokens [offset, offset + count) of a record. Those of 3 bits go to `tile` as codes of 4 bits: kernels of their own
// would be a quarter more of them, for a width that few caches have and that no instruction unpacks.
[[gnu::noinline]] inline Codes codes_of(const Record& record, int offset, int count, Raise raise, uint8_t* tile) {
  const uint8_t* from = record.row(offset);
  if (record.part.bits != 3) return {record.part.bits, from, record.row_bytes};
  const Codes codes = {4, tile, record.dim / 2};
  const uint64_t step = static_cast<uint64_t>(raise) * 0x1111111111111111;
  for (int t = 0; t < count; ++t, from += record.row_bytes, tile += codes.row_bytes) {
    const int sixteens = (record.dim + 15) / 16;  // half of the last may be behind the row: the next overwrites it
#pragma GCC unroll 4
    for (int i = 0; i < sixteens; ++i) {
      uint64_t x;
      std::memcpy(&x, from + 6 * i, sizeof(x));
      x = widen_codes(x) + step;
      std::memcpy(tile + 8 * i, &x, sizeof(x));
    }
  }
  return codes;
}

inline float middle(int bits) { return static_cast<float>((1 << bits) - 1) / 2.0f; }

// min += scale * middle: what levels, codes less their middle, are added to.
inline void centre(int bits, const float* scale, int n, float* min) {
  const float by = middle(bits);
  for (int i = 0; i < n; ++i) min[i] += scale[i] * by;
}

// Calls f(first, count) for the parts of tokens [offset, offset + count) that share their scales.
template <class F>
inline void each_token_group(const Record& record, int offset, int count, F&& f) {
  for (int done = 0; done < count;) {
    const int token = offset + done;
    const int n = std::min(count - done, record.part.group - token % record.part.group);
    f(done, n);
    done += n;
  }
}

// A row's scale (or min) of each channel: groups run along channels, so one number stands for `group` of them.
inline void spread(const f16* per_group, int group, int dim, float* to) {
  for (int d = 0; d < dim; d += 8) {
    const float x = to_float(per_group[d / group]);
    for (int e = 0; e < 8; ++e) to[d + e] = x;
  }
}

// Rows of fp32: code * scale + min.
template <int kBits>
[[gnu::noinline]] void unpack_row(const uint8_t* row, const float* scale, const float* min, int dim, float* to) {
  int d = 0;
  for (; d + W <= dim; d += W) store(load_codes<kBits>(row, d) * load(scale + d) + load(min + d), to + d);
  if constexpr (W > 8) {
    if (d < dim) store_partial(load_codes_half<kBits>(row, d) * load(scale + d) + load(min + d), to + d, dim - d);
  }
}

// The rows of `count` tokens from `offset`.
inline void quant_unpack(const Record& record, int offset, int count, float* to, int ld) {
  alignas(64) float scale[kMaxDim + W], min[kMaxDim + W];
  alignas(64) uint8_t tile[kCodesTile];
  const Codes codes = codes_of(record, offset, count, Raise::kNo, tile);
  const auto unpack = [&](int j) {
    with_code_bits(codes.bits,
                   [&](auto bits) { unpack_row<bits()>(codes.row(j), scale, min, record.dim, to + j * ld); });
  };
  if (record.part.along_tokens) {
    each_token_group(record, offset, count, [&](int done, int n) {
      const int64_t at = int64_t{(offset + done) / record.part.group} * record.dim;
      widen(record.scale + at, record.dim, scale);
      widen(record.min + at, record.dim, min);
      for (int j = done; j < done + n; ++j) unpack(j);
    });
    return;
  }
  for (int j = 0; j < count; ++j) {
    const int64_t at = int64_t{offset + j} * record.groups_per_row();
    spread(record.scale + at, record.part.group, record.dim, scale);
    spread(record.min + at, record.part.group, record.dim, min);
    unpack(j);
  }
}

// Whether the scales and minima of these tokens are all finite.
inline bool quant_finite(const Record& record, int offset, int count) {
  const int group = record.part.group;
  const int64_t begin =
      record.part.along_tokens ? int64_t{offset / group} * record.dim : int64_t{offset} * record.groups_per_row();
  const int64_t end = record.part.along_tokens ? int64_t{(offset + count - 1) / group + 1} * record.dim
                                               : int64_t{offset + count} * record.groups_per_row();
  bool finite = true;
  for (int64_t i = begin; i < end; ++i) {
    finite &= (record.scale[i].bits & 0x7c00) != 0x7c00 && (record.min[i].bits & 0x7c00) != 0x7c00;
  }
  return finite;
}

}  // namespace kvk::cpu::KVK_LEVEL
