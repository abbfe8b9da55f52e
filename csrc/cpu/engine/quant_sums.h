// Weighted sums of the values of a run of tokens of one quantized record, by floats.
#pragma once

#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

// sums[r * kMaxDim + c] = sum over tokens t of p[r * ldp + t * step + c / group] * level of column c, for all columns; no vector
// spans two groups. Eight chains hide the latency of the multiply-add; the last tile begins where it fits.
template <int kBits, int kRows>
[[gnu::noinline]] void code_sums(const Codes& codes, int count, int dim, const float* p, int ldp, int step, int group,
                                 float* sums, Prefetcher& ahead) {
  constexpr int kVecs = W < 16 && kRows <= 2 ? 4 : 2, kColumns = kVecs * W;
  constexpr int kTokens = kRows * kVecs <= 4 ? 2 : 1;
  static_assert(kColumns <= 32);  // the least head dim
  for (int c = 0; c < dim; c += kColumns) {
    const int first = std::min(c, dim - kColumns);
    ahead.step();
    const float* weights[kVecs];
#pragma GCC unroll 4
    for (int e = 0; e < kVecs; ++e) weights[e] = p + (first + e * W) / group;
    V acc[kTokens][kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kTokens * kRows * kVecs; ++i) acc[i / (kRows * kVecs)][i / kVecs % kRows][i % kVecs] = 0.0f;
    const auto add = [&](const uint8_t* row, int t, V(&to)[kRows][kVecs]) __attribute__((always_inline)) {
      V v[kVecs];
#pragma GCC unroll 4
      for (int e = 0; e < kVecs; ++e) v[e] = load_levels<kBits>(row, first + e * W);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int e = 0; e < kVecs; ++e) to[r][e] += V(weights[e][r * ldp + t * step]) * v[e];
      }
    };
    const uint8_t* row = codes.first;
    int t = 0;
    for (; t + kTokens <= count; t += kTokens) {
#pragma GCC unroll 2
      for (int i = 0; i < kTokens; ++i, row += codes.row_bytes) add(row, t + i, acc[i]);
    }
    if (t < count) add(row, t, acc[0]);
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kVecs; ++i) {
      V sum = acc[0][i / kVecs][i % kVecs];
      if constexpr (kTokens == 2) sum += acc[1][i / kVecs][i % kVecs];
      store(sum, sums + i / kVecs * kMaxDim + first + i % kVecs * W);
    }
  }
}

// out[c] = f(out[c], c) for `dim` columns, in vectors.
template <class F>
inline void update_columns(float* out, int dim, F&& f) {
  int c = 0;
  for (; c + W <= dim; c += W) store(f(load(out + c), c), out + c);
  if constexpr (W > 8) {
    if (c < dim) store_partial(f(load_partial(out + c, dim - c), c), out + c, dim - c);
  }
}

// Weights p[t] * scale for every group of channels of every token, [t][per_row] like the scales; bias[g] = sum of p[t] * min, with
// min centred. scale and min: [count][per_row].
inline void scale_weights(const float* p, const float* scale, const float* min, int count, int per_row, float* scaled,
                          float* bias) {
  alignas(64) float repeated[kBlockKeys * kMaxGroups + kMaxGroups];
  for (int t = 0; t < count; ++t) {
    for (int g = 0; g < per_row; g += W)
      store(V(p[t]), repeated + t * per_row + g);  // the next token overwrites the rest
  }
  const int n = count * per_row;
  if (W % per_row == 0 && n % W == 0) {
    V sum = 0.0f;  // lane i: of group i % per_row
    for (int i = 0; i < n; i += W) {
      const V weight = load(repeated + i);
      store(weight * load(scale + i), scaled + i);
      sum += weight * load(min + i);
    }
    std::fill(bias, bias + per_row, 0.0f);
    for (int i = 0; i < W; ++i) bias[i % per_row] += sum[i];
    return;
  }
  std::fill(bias, bias + per_row, 0.0f);
  for (int i = 0; i < n; ++i) {
    scaled[i] = repeated[i] * scale[i];
    bias[i % per_row] += repeated[i] * min[i];
  }
}

// A run of tokens' weights for up to four query rows, p[r * kBlockKeys + t], and where their sums go:
// out[r] = out[r] * factor[r] + sum over t of p[r][t] * v_t.
struct WeightedRows {
  const float* p;
  const float* factor;
  int num_rows;
  float* out;
  int ldo;

  WeightedRows part(int first, int rows) const {
    return {p + first * kBlockKeys, factor + first, rows, out + first * ldo, ldo};
  }
};

// V per token: the scale of each token and group enters the weights. Groups are of whole vectors.
inline void accumulate_along_channels(const Record& record, const Codes& codes, int offset, int count,
                                      const WeightedRows& rows, Prefetcher& ahead) {
  constexpr int ld = kBlockKeys * kMaxGroups;
  alignas(64) float scale[ld], min[ld], scaled[4 * ld], sums[4 * kMaxDim];
  float bias[4][kMaxGroups];
  const int per_row = record.groups_per_row(), group = record.part.group;
  widen(record.scale + int64_t{offset} * per_row, count * per_row, scale);
  widen(record.min + int64_t{offset} * per_row, count * per_row, min);
  centre(record.part.bits, scale, count * per_row, min);
  for (int r = 0; r < rows.num_rows; ++r) {
    scale_weights(rows.p + r * kBlockKeys, scale, min, count, per_row, scaled + r * ld, bias[r]);
  }
  with_code_bits(codes.bits, [&](auto bits) {
    with_rows(rows.num_rows, [&](auto n) {
      code_sums<bits(), n()>(codes, count, record.dim, scaled, ld, per_row, group, sums, ahead);
    });
  });
  for (int r = 0; r < rows.num_rows; ++r) {
    for (int g = 0; g < per_row; ++g) {
      const float* sum = sums + r * kMaxDim + g * group;
      update_columns(rows.out + r * rows.ldo + g * group, group,
                     [&](V before, int c) { return before * rows.factor[r] + (load(sum + c) + bias[r][g]); });
    }
  }
}

// V per channel: scale and min enter the finished sums of a group of tokens.
inline void accumulate_along_tokens(const Record& record, const Codes& codes, int offset, int count,
                                    const WeightedRows& rows, Prefetcher& ahead) {
  alignas(64) float scale[kMaxDim + W], min[kMaxDim + W], sums[4 * kMaxDim + W];
  each_token_group(record, offset, count, [&](int begin, int n) {
    const int64_t at = int64_t{(offset + begin) / record.part.group} * record.dim;
    widen(record.scale + at, record.dim, scale);
    widen(record.min + at, record.dim, min);
    centre(record.part.bits, scale, record.dim, min);
    const Codes group = {codes.bits, codes.row(begin), codes.row_bytes};
    with_code_bits(codes.bits, [&](auto bits) {
      with_rows(rows.num_rows, [&](auto num_rows) {
        code_sums<bits(), num_rows()>(group, n, record.dim, rows.p + begin, kBlockKeys, 1, record.dim, sums, ahead);
      });
    });
    for (int r = 0; r < rows.num_rows; ++r) {
      float weight = 0.0f;
      for (int t = begin; t < begin + n; ++t) weight += rows.p[r * kBlockKeys + t];
      const float keep = begin == 0 ? rows.factor[r] : 1.0f;
      const float* sum = sums + r * kMaxDim;
      update_columns(rows.out + r * rows.ldo, record.dim, [&](V before, int c) {
        return before * keep + (load(sum + c) * load(scale + c) + load(min + c) * weight);
      });
    }
  });
}

inline void accumulate_floats(const Record& record, int offset, int count, const WeightedRows& rows,
                              Prefetcher& ahead) {
  alignas(64) uint8_t tile[kCodesTile];
  const Codes codes = codes_of(record, offset, count, Raise::kMiddle, tile);
  record.part.along_tokens ? accumulate_along_tokens(record, codes, offset, count, rows, ahead)
                           : accumulate_along_channels(record, codes, offset, count, rows, ahead);
}

}  // namespace kvk::cpu::KVK_LEVEL
