// The inner loops over quantized records: scores, weighted sums and unpacking of a run of tokens of one record.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/engine/dense.h"
#include "cpu/simd_codes.h"
#include "kvk/quant.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kMaxDim = 256;

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

// --- scores ----------------------------------------------------------------------------------------------------------

// s[r * kBlockKeys + j] = bias[r] + q_r . level_j for kRows rows and kKeys consecutive tokens; kRows * kKeys a multiple of 4.
template <int kBits, int kRows, int kKeys>
inline void code_dots(const float* q, int ldq, const float* bias, const uint8_t* const* keys, int dim, float* s,
                      int valid) {
  V acc[kRows * kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kKeys; ++i) acc[i] = 0.0f;
  const auto step = [&](int d, auto&& load_key) __attribute__((always_inline)) {
    V k[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = load_key(keys[j], d);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = load(q + r * ldq + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) acc[r * kKeys + j] += x * k[j];
    }
  };
  int d = 0;
  for (; d + W <= dim; d += W) step(d, [](const uint8_t* row, int at) { return load_levels<kBits>(row, at); });
  if (d < dim) step(d, [](const uint8_t* row, int at) { return load_levels_half<kBits>(row, at); });
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kKeys; i += 4) {
    float sums[4];
    sum_lanes(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums);
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const int r = (i + e) / kKeys, j = (i + e) % kKeys;
      if (j < valid) s[r * kBlockKeys + j] = sums[e] + bias[r];
    }
  }
}

template <int kBits, int kRows>
inline void code_dots_rows(const float* q, int ldq, const float* bias, const Record& record, int token, int count,
                           float* s) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : kManyRegisters ? 4 : kRows == 4 ? 2 : 4;
  for (int j = 0; j < count; j += kKeys) {
    const uint8_t* keys[kKeys];
    for (int e = 0; e < kKeys; ++e) keys[e] = record.row(token + std::min(j + e, count - 1));
    code_dots<kBits, kRows, kKeys>(q, ldq, bias, keys, record.dim, s + j, count - j);
  }
}

template <int kBits>
inline void scores_along_tokens(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
                                float* s, Prefetcher& ahead) {
  alignas(64) float scaled[4 * kMaxDim], scale[kMaxDim], min[kMaxDim];
  each_token_group(record, offset, count, [&](int done, int n) {
    ahead.step();
    const int64_t at = int64_t{(offset + done) / record.part.group} * record.dim;
    const int dim = record.dim, ld = padded(dim);
    widen(record.scale + at, dim, scale);
    widen(record.min + at, dim, min);
    centre<kBits>(scale, dim, min);
    std::fill(scale + dim, scale + ld, 0.0f);
    std::fill(min + dim, min + ld, 0.0f);
    for (int r = 0; r < num_rows; r += 4) {
      const int rows = std::min(4, num_rows - r);
      float bias[4];
      for (int e = 0; e < 4; ++e) {
        const float* row = q + (r + std::min(e, rows - 1)) * ldq;
        V sum = 0.0f;
        for (int d = 0; d < ld; d += W) {
          const V x = d < dim ? load(row + d) : V(0.0f);
          if (e < rows) store(x * load(scale + d), scaled + e * kMaxDim + d);
          sum += x * load(min + d);
        }
        float sums[4];
        sum_lanes(sum, sum, sum, sum, sums);
        bias[e] = sums[0];
      }
      float* to = s + r * kBlockKeys + done;
      switch (rows) {
        case 1: code_dots_rows<kBits, 1>(scaled, kMaxDim, bias, record, offset + done, n, to); break;
        case 2: code_dots_rows<kBits, 2>(scaled, kMaxDim, bias, record, offset + done, n, to); break;
        case 3: code_dots_rows<kBits, 3>(scaled, kMaxDim, bias, record, offset + done, n, to); break;
        default: code_dots_rows<kBits, 4>(scaled, kMaxDim, bias, record, offset + done, n, to); break;
      }
    }
  });
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

template <int kBits>
inline void scores_along_channels(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
                                  float* s, Prefetcher& ahead) {
  // Four tokens at a time become floats in the first-level cache, and serve all rows.
  constexpr int kTokens = 4;
  alignas(64) float rows[kTokens * kMaxDim];
  const int ld = padded(record.dim);
  for (int j = 0; j < count; j += kTokens) {
    ahead.step();
    const int n = std::min(kTokens, count - j);
    std::fill(rows, rows + kTokens * kMaxDim, 0.0f);
    unpack_along_channels<kBits>(record, offset + j, n, rows, kMaxDim);
    for (int r = 0; r < num_rows; ++r) {
      V acc[kTokens] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int d = 0; d < ld; d += W) {
        const V x = d < record.dim ? load(q + r * ldq + d) : V(0.0f);
#pragma GCC unroll 4
        for (int e = 0; e < kTokens; ++e) acc[e] += x * load(rows + e * kMaxDim + d);
      }
      float sums[4];
      sum_lanes(acc[0], acc[1], acc[2], acc[3], sums);
      std::copy_n(sums, n, s + r * kBlockKeys + j);
    }
  }
}

// s[r * kBlockKeys + j] = q_r . k_j for `count` tokens of a record from token `offset`.
template <int kBits>
inline void quant_scores(const Record& record, int offset, int count, const float* q, int ldq, int num_rows, float* s,
                         Prefetcher& ahead) {
  if (record.part.along_tokens) {
    scores_along_tokens<kBits>(record, offset, count, q, ldq, num_rows, s, ahead);
  } else {
    scores_along_channels<kBits>(record, offset, count, q, ldq, num_rows, s, ahead);
  }
}

// --- weighted sums ---------------------------------------------------------------------------------------------------

// Sums over tokens of p[r][t] * level for kVecs vectors of columns from `first`; put(r, e, sum) takes them.
template <int kBits, int kRows, int kVecs, bool kHalf, class Put>
inline void code_sums(const float* p, int ldp, const Record& record, int token, int count, int first, Put&& put) {
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < kVecs; ++e) acc[r][e] = 0.0f;
  }
  for (int t = 0; t < count; ++t) {
    const uint8_t* row = record.row(token + t);
    V v[kVecs];
#pragma GCC unroll 16
    for (int e = 0; e < kVecs; ++e) {
      v[e] = kHalf ? load_levels_half<kBits>(row, first) : load_levels<kBits>(row, first + e * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = p[r * ldp + t];
#pragma GCC unroll 16
      for (int e = 0; e < kVecs; ++e) acc[r][e] += x * v[e];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < kVecs; ++e) put(r, first + e * W, acc[r][e]);
  }
}

// The same over columns [begin, end), a multiple of 8 of them.
template <int kBits, int kRows, class Put>
inline void code_sums_columns(const float* p, int ldp, const Record& record, int token, int count, int begin, int end,
                              Put&& put) {
  constexpr int kVecs = kManyRegisters || kRows == 1 ? 4 : 2;
  int c = begin;
  for (; c + kVecs * W <= end; c += kVecs * W) {
    code_sums<kBits, kRows, kVecs, false>(p, ldp, record, token, count, c, put);
  }
  for (; c + W <= end; c += W) code_sums<kBits, kRows, 1, false>(p, ldp, record, token, count, c, put);
  if (c < end) code_sums<kBits, kRows, 1, true>(p, ldp, record, token, count, c, put);
}

// out[0 .. min(W, left)) = f(out): the columns behind belong to another group.
template <class F>
inline void update(float* out, int left, F&& f) {
  if (left >= W) {
    store(f(load(out)), out);
  } else {
    store_partial(f(load_partial(out, left)), out, left);
  }
}

template <int kBits, int kRows>
inline void accumulate_along_channels(const Record& record, int offset, int count, const float* p, const float* factor,
                                      float* out, int ldo) {
  alignas(64) float scale[kBlockKeys * kMaxDim / 16], min[kBlockKeys * kMaxDim / 16];
  alignas(64) float scaled[kRows * kBlockKeys];
  const int per_row = record.groups_per_row(), group = record.part.group;
  widen(record.scale + int64_t{offset} * per_row, count * per_row, scale);
  widen(record.min + int64_t{offset} * per_row, count * per_row, min);
  centre<kBits>(scale, count * per_row, min);
  for (int g = 0; g < per_row; ++g) {
    float bias[kRows];
    for (int r = 0; r < kRows; ++r) {
      float sum = 0.0f;
      for (int t = 0; t < count; ++t) {
        const float weight = p[r * kBlockKeys + t];
        scaled[r * kBlockKeys + t] = weight * scale[t * per_row + g];
        sum += weight * min[t * per_row + g];
      }
      bias[r] = sum;
    }
    const int end = (g + 1) * group;
    code_sums_columns<kBits, kRows>(
        scaled, kBlockKeys, record, offset, count, g * group, end, [&](int r, int c, V sum) {
          update(out + r * ldo + c, end - c, [&](V x) { return x * factor[r] + (sum + bias[r]); });
        });
  }
}

template <int kBits, int kRows>
inline void accumulate_along_tokens(const Record& record, int offset, int count, const float* p, const float* factor,
                                    float* out, int ldo) {
  alignas(64) float scale[kMaxDim + W], min[kMaxDim + W];
  each_token_group(record, offset, count, [&](int done, int n) {
    const int64_t at = int64_t{(offset + done) / record.part.group} * record.dim;
    widen(record.scale + at, record.dim, scale);
    widen(record.min + at, record.dim, min);
    centre<kBits>(scale, record.dim, min);
    float weights[kRows];
    for (int r = 0; r < kRows; ++r) {
      weights[r] = 0.0f;
      for (int t = 0; t < n; ++t) weights[r] += p[r * kBlockKeys + done + t];
    }
    code_sums_columns<kBits, kRows>(
        p + done, kBlockKeys, record, offset + done, n, 0, record.dim, [&](int r, int c, V sum) {
          const float keep = done == 0 ? factor[r] : 1.0f;
          update(out + r * ldo + c, record.dim - c,
                 [&](V x) { return x * keep + (sum * load(scale + c) + load(min + c) * weights[r]); });
        });
  });
}

// out[r] = out[r] * factor[r] + sum over `count` tokens from `offset` of p[r][t] * v_t.
template <int kBits>
inline void quant_accumulate(const Record& record, int offset, int count, const float* p, const float* factor,
                             int num_rows, float* out, int ldo, Prefetcher& ahead) {
  for (int r = 0; r < num_rows; r += 4) {
    for (int i = 0; i < 8; ++i) ahead.step();
    const auto rows = [&](auto n) {
      const float* pr = p + r * kBlockKeys;
      if (record.part.along_tokens) {
        accumulate_along_tokens<kBits, n()>(record, offset, count, pr, factor + r, out + r * ldo, ldo);
      } else {
        accumulate_along_channels<kBits, n()>(record, offset, count, pr, factor + r, out + r * ldo, ldo);
      }
    };
    switch (std::min(4, num_rows - r)) {
      case 1: rows(std::integral_constant<int, 1>()); break;
      case 2: rows(std::integral_constant<int, 2>()); break;
      case 3: rows(std::integral_constant<int, 3>()); break;
      default: rows(std::integral_constant<int, 4>()); break;
    }
  }
}

// --- the rest --------------------------------------------------------------------------------------------------------

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
