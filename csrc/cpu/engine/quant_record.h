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

// min += scale * kMiddle: what levels, codes less kMiddle, are added to.
template <int kBits>
inline void centre(const float* scale, int n, float* min) {
  for (int i = 0; i < n; ++i) min[i] += scale[i] * kMiddle<kBits>;
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

// The rows of `count` tokens from `token`, as floats.
template <int kBits>
inline void unpack_along_channels(const Record& record, int token, int count, float* to, int ld) {
  alignas(64) float scale[kMaxDim], min[kMaxDim];
  for (int j = 0; j < count; ++j) {
    const int64_t at = int64_t{token + j} * record.groups_per_row();
    spread(record.scale + at, record.part.group, record.dim, scale);
    spread(record.min + at, record.part.group, record.dim, min);
    const uint8_t* row = record.row(token + j);
    int d = 0;
    for (; d + W <= record.dim; d += W) {
      store(load_codes<kBits>(row, d) * load(scale + d) + load(min + d), to + j * ld + d);
    }
    if (d < record.dim) {
      const V tail = load_codes_half<kBits>(row, d) * load(scale + d) + load(min + d);
      store_partial(tail, to + j * ld + d, record.dim - d);
    }
  }
}

// Rows of fp32.
template <int kBits>
inline void quant_unpack(const Record& record, int offset, int count, float* to, int ld) {
  if (!record.part.along_tokens) return unpack_along_channels<kBits>(record, offset, count, to, ld);
  alignas(64) float scale[kMaxDim + W], min[kMaxDim + W];
  each_token_group(record, offset, count, [&](int done, int n) {
    const int64_t at = int64_t{(offset + done) / record.part.group} * record.dim;
    widen(record.scale + at, record.dim, scale);
    widen(record.min + at, record.dim, min);
    for (int j = done; j < done + n; ++j) {
      const uint8_t* row = record.row(offset + j);
      int d = 0;
      for (; d + W <= record.dim; d += W) {
        store(load_codes<kBits>(row, d) * load(scale + d) + load(min + d), to + j * ld + d);
      }
      if (d < record.dim) {
        const V tail = load_codes_half<kBits>(row, d) * load(scale + d) + load(min + d);
        store_partial(tail, to + j * ld + d, record.dim - d);
      }
    }
  });
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
