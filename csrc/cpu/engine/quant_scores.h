// Scores over a run of tokens of one quantized record.
#pragma once

#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

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
  constexpr int kTokens = kVecs * W, kCodes = 32 / kBits;
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
  for (int d = 0; d < dim; d += kCodes, tile += kTokens) {
    VU32 words[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) words[v] = VU32(tile + v * W, stdx::element_aligned);
#pragma GCC unroll 16
    for (int i = 0; i < kCodes; ++i) {
      if (i % 8 == 0 && d + i >= dim) break;
      V levels[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) levels[v] = word_levels<kBits>(words[v], i);
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

// The rows of q times the scales of a group of tokens; bias: what the minima add, and the middles of the codes. Rows of q are
// whole vectors, zeros behind dim.
template <int kRows>
inline void scale_queries(const float* q, int ldq, const f16* scale, const f16* min, int dim, float middle,
                          float* scaled, float* bias) {
  V sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto step = [&](int d, V scales, V mins) __attribute__((always_inline)) {
    mins += scales * middle;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V x = load(q + r * ldq + d);
      store(x * scales, scaled + r * kMaxDim + d);
      sum[r] += x * mins;
    }
  };
  int d = 0;
  for (; d + W <= dim; d += W) step(d, load(scale + d), load(min + d));
  if constexpr (W > 8) {
    if (d < dim) step(d, load_half(scale + d), load_half(min + d));
  }
  sum_lanes(sum[0], sum[1], sum[2], sum[3], bias);
}

// K per channel.
template <int kRows>
void scores_along_tokens(const Record& record, const Codes& codes, int offset, int count, const float* q, int ldq,
                         float* s, Prefetcher& ahead) {
  // Eight chains of multiply-adds hide their latency; more than 32 tokens seldom share their scales.
  constexpr int kVecs = kRows <= 2 && W < 16 ? 4 : 2, kTokens = kVecs * W;
  alignas(64) float scaled[kRows * kMaxDim];
  alignas(64) uint32_t tile[kMaxWords * kTokens];
  float bias[4];
  each_token_group(record, offset, count, [&](int begin, int n) {
    const int64_t at = int64_t{(offset + begin) / record.part.group} * record.dim;
    scale_queries<kRows>(q, ldq, record.scale + at, record.min + at, record.dim, middle(record.part.bits), scaled,
                         bias);
    for (int j = begin; j < begin + n; j += kTokens) {
      const int valid = begin + n - j;
      for (int i = 0; i < kTokens; i += 8) ahead.step();
      transpose_rows<kTokens>(codes.row(j), codes.row_bytes, valid, tile);
      with_code_bits(codes.bits, [&](auto bits) {
        word_dots<bits(), kRows, kVecs>(tile, scaled, kMaxDim, record.dim, bias, valid, s + j);
      });
    }
  });
}

// s[r * kBlockKeys + t] = sum over groups of channels of scale[t][group] * (q_r . levels of the group).
template <int kBits, int kRows>
[[gnu::noinline]] void grouped_dots(const Codes& codes, int count, int group, int per_row, const float* scale,
                                    const float* q, int ldq, float* s, Prefetcher& ahead) {
  constexpr int kKeys = 4 / kRows;
  for (int j = 0; j < count; j += kKeys) {
    if (j % 4 == 0) ahead.step();
    const uint8_t* keys[kKeys];
    const float* scales[kKeys];
    for (int e = 0; e < kKeys; ++e) {
      const int t = std::min(j + e, count - 1);
      keys[e] = codes.row(t);
      scales[e] = scale + t * per_row;
    }
    V acc[kRows * kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kKeys; ++i) acc[i] = 0.0f;
    for (int g = 0; g < per_row; ++g) {
      V part[kRows * kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kRows * kKeys; ++i) part[i] = 0.0f;
      for (int d = g * group; d < (g + 1) * group; d += W) {
        V k[kKeys];
#pragma GCC unroll 4
        for (int e = 0; e < kKeys; ++e) k[e] = load_levels<kBits>(keys[e], d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V x = load(q + r * ldq + d);
#pragma GCC unroll 4
          for (int e = 0; e < kKeys; ++e) part[r * kKeys + e] += x * k[e];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows * kKeys; ++i) acc[i] += part[i] * V(scales[i % kKeys][g]);
    }
    float sums[4];
    sum_lanes(acc[0], acc[1], acc[2], acc[3], sums);
    for (int i = 0; i < kRows * kKeys; ++i) {
      const int t = j + i % kKeys;
      if (t < count) s[i / kKeys * kBlockKeys + t] = sums[i];
    }
  }
}

// K per token: a factor for each group of channels. Groups are of whole vectors.
inline void scores_along_channels(const Record& record, const Codes& codes, int offset, int count, const float* q,
                                  int ldq, int num_rows, float* s, Prefetcher& ahead) {
  const int per_row = record.groups_per_row(), group = record.part.group;
  alignas(64) float scale[kBlockKeys * kMaxGroups], min[kBlockKeys * kMaxGroups];
  widen(record.scale + int64_t{offset} * per_row, count * per_row, scale);
  widen(record.min + int64_t{offset} * per_row, count * per_row, min);
  centre(record.part.bits, scale, count * per_row, min);
  for (int r = 0; r < num_rows;) {
    const int rows = num_rows - r >= 4 ? 4 : num_rows - r >= 2 ? 2 : 1;
    const auto dots = [&](auto bits, auto n) {
      grouped_dots<bits(), n()>(codes, count, group, per_row, scale, q + r * ldq, ldq, s + r * kBlockKeys, ahead);
    };
    with_code_bits(codes.bits, [&](auto bits) {
      switch (rows) {
        case 1: return dots(bits, std::integral_constant<int, 1>());
        case 2: return dots(bits, std::integral_constant<int, 2>());
        default: return dots(bits, std::integral_constant<int, 4>());
      }
    });
    r += rows;
  }
  for (int r = 0; r < num_rows; ++r) {
    float q_sums[kMaxGroups];  // of each group's channels
    for (int g = 0; g < per_row; ++g) {
      V sum = 0.0f;
      for (int d = g * group; d < (g + 1) * group; d += W) sum += load(q + r * ldq + d);
      float sums[4];
      sum_lanes(sum, sum, sum, sum, sums);
      q_sums[g] = sums[0];
    }
    float* to = s + r * kBlockKeys;
    for (int t = 0; t < count; ++t) {
      for (int g = 0; g < per_row; ++g) to[t] += min[t * per_row + g] * q_sums[g];
    }
  }
}

// s[r * kBlockKeys + j] = q_r . k_j for `count` tokens of a record from token `offset`.
inline void quant_scores(const Record& record, int offset, int count, const float* q, int ldq, int num_rows, float* s,
                         Prefetcher& ahead) {
  alignas(64) uint8_t tile[kCodesTile];
  const Codes codes = codes_of(record, offset, count, Raise::kMiddle, tile);
  if (!record.part.along_tokens) {
    return scores_along_channels(record, codes, offset, count, q, ldq, num_rows, s, ahead);
  }
  for (int r = 0; r < num_rows; r += 4) {
    with_rows(num_rows - r, [&](auto rows) {
      scores_along_tokens<rows()>(record, codes, offset, count, q + r * ldq, ldq, s + r * kBlockKeys, ahead);
    });
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
