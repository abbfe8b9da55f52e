// Scores over a run of tokens of one quantized record.
#pragma once

#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

// f(min(4, rows)) as a constant.
template <class F>
inline void with_rows(int rows, F&& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

inline constexpr int kMaxWords = kMaxDim / 4;  // of a row

// The rows of kTokens tokens, the first `count` of them valid, as tile[word][token].
template <int kTokens>
inline void transpose_rows(const uint8_t* row, int64_t row_bytes, int count, uint32_t* tile) {
  const int words = static_cast<int>((row_bytes + 3) / 4);
  for (int j = 0; j < kTokens; j += 8) {
    const uint8_t* rows[8];
    for (int e = 0; e < 8; ++e) rows[e] = row + std::min(j + e, count - 1) * row_bytes;
    // What is read behind the last row of a record is its scales and minima.
    for (int w = 0; w < words; w += 8) {
      transpose_words_8x8(rows, tile + w * kTokens + j, kTokens);
      for (const uint8_t*& p : rows) p += 8 * sizeof(uint32_t);
    }
  }
}

// s[r * kBlockKeys + j] = bias[r] + q_r . level_j for kRows rows and kVecs vectors of tokens. A lane is a token: nothing is
// summed across lanes, and an element of q serves W tokens. For 8 tokens and a channel, R rows (AVX2): 2 instructions to
// unpack codes of 2 bits, 4 of 4 or 8, and R multiply-adds. Not inlined, where GCC would spill the sums.
template <int kBits, int kRows, int kVecs>
[[gnu::noinline]] void word_dots(const uint32_t* tile, const float* q, int ldq, int dim, const float* bias, int valid,
                                 float* s) {
  constexpr int kTokens = kVecs * W, kWords = kUnitWords<kBits>, kCodes = kUnitCodes<kBits>;
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kVecs; ++i) acc[i / kVecs][i % kVecs] = 0.0f;
  const auto add = [&](int d, const V* levels) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V x = q[r * ldq + d];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] += x * levels[v];
    }
  };
  for (int d = 0; d < dim; d += kCodes, tile += kWords * kTokens) {
    VU32 words[kVecs][kWords];
#pragma GCC unroll 16
    for (int i = 0; i < kWords * kVecs; ++i) {
      words[i % kVecs][i / kVecs] = VU32(tile + i * W, stdx::element_aligned);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCodes; ++i) {
      if (i % 8 == 0 && d + i >= dim) break;
      V levels[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) levels[v] = unit_levels<kBits>(words[v], i);
      add(d + i, levels);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kVecs; ++i) {
    const int left = valid - i % kVecs * W;
    float* to = s + i / kVecs * kBlockKeys + i % kVecs * W;
    const V sum = acc[i / kVecs][i % kVecs] + bias[i / kVecs];
    if (left >= W) {
      store(sum, to);
    } else if (left > 0) {
      store_partial(sum, to, left);
    }
  }
}

template <int kBits, int kRows>
inline void code_dots_rows(const float* q, int ldq, const float* bias, const Record& record, int token, int count,
                           float* s, Prefetcher& ahead) {
  // Eight chains of multiply-adds hide their latency; more than 32 tokens seldom share their scales.
  constexpr int kVecs = kRows <= 2 && W < 16 ? 4 : 2, kTokens = kVecs * W;
  alignas(64) uint32_t tile[kMaxWords * kTokens];
  for (int j = 0; j < count; j += kTokens) {
    for (int i = 0; i < kTokens; i += 8) ahead.step();
    transpose_rows<kTokens>(record.row(token + j), record.row_bytes, count - j, tile);
    word_dots<kBits, kRows, kVecs>(tile, q, ldq, record.dim, bias, count - j, s + j);
  }
}

// The rows of q times the scales of a group of tokens; bias: what the minima add, and the middles of the codes. Rows of q are
// whole vectors, zeros behind dim.
template <int kBits, int kRows>
inline void scale_queries(const float* q, int ldq, const f16* scale, const f16* min, int dim, float* scaled,
                          float* bias) {
  V sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto step = [&](int d, V scales, V mins) __attribute__((always_inline)) {
    mins += scales * kMiddle<kBits>;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V x = load(q + r * ldq + d);
      store(x * scales, scaled + r * kMaxDim + d);
      sum[r] += x * mins;
    }
  };
  int d = 0;
  for (; d + W <= dim; d += W) step(d, load(scale + d), load(min + d));
  if (d < dim) step(d, load_half(scale + d), load_half(min + d));
  sum_lanes(sum[0], sum[1], sum[2], sum[3], bias);
}

template <int kBits, int kRows>
inline void scores_along_tokens_rows(const Record& record, int offset, int count, const float* q, int ldq, float* s,
                                     Prefetcher& ahead) {
  alignas(64) float scaled[kRows * kMaxDim];
  float bias[4];
  each_token_group(record, offset, count, [&](int done, int n) {
    const int64_t at = int64_t{(offset + done) / record.part.group} * record.dim;
    scale_queries<kBits, kRows>(q, ldq, record.scale + at, record.min + at, record.dim, scaled, bias);
    code_dots_rows<kBits, kRows>(scaled, kMaxDim, bias, record, offset + done, n, s + done, ahead);
  });
}

template <int kBits>
inline void scores_along_tokens(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
                                float* s, Prefetcher& ahead) {
  for (int r = 0; r < num_rows; r += 4) {
    const auto rows = [&](auto n) {
      scores_along_tokens_rows<kBits, n()>(record, offset, count, q + r * ldq, ldq, s + r * kBlockKeys, ahead);
    };
    with_rows(num_rows - r, rows);
  }
}

template <int kBits>
inline void scores_unpacked(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
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

// Per token and group of channels a factor: the dot product of each group's levels is scaled once. scale: [kKeys][per_row] of
// these tokens. Sums without what min adds.
template <int kBits, int kRows, int kKeys>
inline void grouped_dots(const float* q, int ldq, const Record& record, const uint8_t* const* keys, const float* scale,
                         float* sums) {
  const int group = record.part.group, per_row = record.groups_per_row();
  V acc[kRows * kKeys];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kKeys; ++i) acc[i] = 0.0f;
  for (int g = 0; g < per_row; ++g) {
    V part[kRows * kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kKeys; ++i) part[i] = 0.0f;
    for (int d = g * group; d < (g + 1) * group; d += W) {
      V k[kKeys];
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) k[j] = load_levels<kBits>(keys[j], d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V x = load(q + r * ldq + d);
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; ++j) part[r * kKeys + j] += x * k[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kKeys; ++i) acc[i] += part[i] * V(scale[i % kKeys * per_row + g]);
  }
  sum_lanes(acc[0], acc[1], acc[2], acc[3], sums);
}

template <int kBits, int kRows>
inline void grouped_dots_rows(const float* q, int ldq, const float* q_sums, const Record& record, int token, int count,
                              const float* scale, const float* min, float* s, Prefetcher& ahead) {
  constexpr int kKeys = 4 / kRows;
  const int per_row = record.groups_per_row();
  for (int j = 0; j < count; j += kKeys) {
    if (j % 4 == 0) ahead.step();
    const uint8_t* keys[kKeys];
    alignas(64) float scales[kKeys * kMaxGroups];
    for (int e = 0; e < kKeys; ++e) {
      const int t = std::min(j + e, count - 1);
      keys[e] = record.row(token + t);
      std::copy_n(scale + t * per_row, per_row, scales + e * per_row);
    }
    float sums[4];
    grouped_dots<kBits, kRows, kKeys>(q, ldq, record, keys, scales, sums);
    for (int i = 0; i < kRows * kKeys; ++i) {
      const int r = i / kKeys, t = j + i % kKeys;
      if (t >= count) continue;
      float sum = sums[i];
      for (int g = 0; g < per_row; ++g) sum += min[t * per_row + g] * q_sums[r * kMaxGroups + g];
      s[r * kBlockKeys + t] = sum;
    }
  }
}

template <int kBits>
inline void scores_along_channels(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
                                  float* s, Prefetcher& ahead) {
  const int per_row = record.groups_per_row(), group = record.part.group;
  if (group % W != 0) return scores_unpacked<kBits>(record, offset, count, q, ldq, num_rows, s, ahead);
  alignas(64) float scale[kBlockKeys * kMaxGroups], min[kBlockKeys * kMaxGroups];
  widen(record.scale + int64_t{offset} * per_row, count * per_row, scale);
  widen(record.min + int64_t{offset} * per_row, count * per_row, min);
  centre<kBits>(scale, count * per_row, min);
  for (int r = 0; r < num_rows;) {
    const int rows = num_rows - r >= 4 ? 4 : num_rows - r >= 2 ? 2 : 1;
    const float* qr = q + r * ldq;
    float q_sums[4 * kMaxGroups];  // of each group's channels
    for (int e = 0; e < rows; ++e) {
      for (int g = 0; g < per_row; ++g) {
        V sum = 0.0f;
        for (int d = g * group; d < (g + 1) * group; d += W) sum += load(qr + e * ldq + d);
        float sums[4];
        sum_lanes(sum, sum, sum, sum, sums);
        q_sums[e * kMaxGroups + g] = sums[0];
      }
    }
    float* to = s + r * kBlockKeys;
    switch (rows) {
      case 1: grouped_dots_rows<kBits, 1>(qr, ldq, q_sums, record, offset, count, scale, min, to, ahead); break;
      case 2: grouped_dots_rows<kBits, 2>(qr, ldq, q_sums, record, offset, count, scale, min, to, ahead); break;
      default: grouped_dots_rows<kBits, 4>(qr, ldq, q_sums, record, offset, count, scale, min, to, ahead); break;
    }
    r += rows;
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
