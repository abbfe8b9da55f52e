// Weighted sums of the values of a run of tokens of one quantized record.
#pragma once

#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

// Sums over tokens of p[e][r * ldp + t * step] * level for kVecs vectors of columns from `first`; put(r, column, sum) takes them. kTokens
// tokens go to accumulators of their own: eight chains hide the latency of the multiply-add.
template <int kBits, int kRows, int kVecs, int kTokens, bool kHalf, class Put>
inline void code_sums(const float* const (&p)[kVecs], int ldp, int step, const Record& record, int token, int count,
                      int first, Put&& put) {
  V acc[kTokens][kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kTokens * kRows * kVecs; ++i) acc[i / (kRows * kVecs)][i / kVecs % kRows][i % kVecs] = 0.0f;
  const auto add = [&](const uint8_t* row, int t, V(&to)[kRows][kVecs]) __attribute__((always_inline)) {
    V v[kVecs];
#pragma GCC unroll 16
    for (int e = 0; e < kVecs; ++e) {
      v[e] = kHalf ? load_levels_half<kBits>(row, first) : load_levels<kBits>(row, first + e * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int e = 0; e < kVecs; ++e) to[r][e] += V(p[e][r * ldp + t * step]) * v[e];
    }
  };
  const uint8_t* row = record.row(token);
  int t = 0;
  for (; t + kTokens <= count; t += kTokens, row += kTokens * record.row_bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) add(row + i * record.row_bytes, t + i, acc[i]);
  }
  for (; t < count; ++t, row += record.row_bytes) add(row, t, acc[0]);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int e = 0; e < kVecs; ++e) {
      V sum = acc[0][r][e];
#pragma GCC unroll 4
      for (int i = 1; i < kTokens; ++i) sum += acc[i][r][e];
      put(r, first + e * W, sum);
    }
  }
}

// The same over columns [begin, end), a multiple of 8 of them; weights(column) gives p.
template <int kBits, int kRows, class Weights, class Put>
inline void code_sums_columns(Weights&& weights, int ldp, int step, const Record& record, int token, int count,
                              int begin, int end, Prefetcher& ahead, Put&& put) {
  constexpr int kVecs = kManyRegisters || kRows <= 2 ? 4 : 2;
  constexpr int kTokens = kRows == 1 ? 2 : 1;
  int c = begin;
  for (; c + kVecs * W <= end; c += kVecs * W) {
    ahead.step();
    const float* p[kVecs];
    for (int e = 0; e < kVecs; ++e) p[e] = weights(c + e * W);
    code_sums<kBits, kRows, kVecs, kTokens, false>(p, ldp, step, record, token, count, c, put);
  }
  for (; c < end; c += W) {
    ahead.step();
    const float* const p[1] = {weights(c)};
    if (c + W <= end) {
      code_sums<kBits, kRows, 1, 4, false>(p, ldp, step, record, token, count, c, put);
    } else {
      code_sums<kBits, kRows, 1, 1, true>(p, ldp, step, record, token, count, c, put);
    }
  }
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

// Weights p[t] * scale for every group of channels of every token, [t][per_row] like the scales; bias[g] = sum of p[t] * min, with
// min centred. scale and min: [count][per_row].
template <int kBits>
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

template <int kBits, int kRows>
inline void accumulate_along_channels(const Record& record, int offset, int count, const float* p, const float* factor,
                                      float* out, int ldo, Prefetcher& ahead) {
  alignas(64) float scale[kBlockKeys * kMaxGroups], min[kBlockKeys * kMaxGroups];
  alignas(64) float scaled[kRows * kBlockKeys * kMaxGroups];
  float bias[kRows][kMaxGroups];
  const int per_row = record.groups_per_row(), group = record.part.group;
  widen(record.scale + int64_t{offset} * per_row, count * per_row, scale);
  widen(record.min + int64_t{offset} * per_row, count * per_row, min);
  centre<kBits>(scale, count * per_row, min);
  constexpr int ld = kBlockKeys * kMaxGroups;
  for (int r = 0; r < kRows; ++r) {
    scale_weights<kBits>(p + r * kBlockKeys, scale, min, count, per_row, scaled + r * ld, bias[r]);
  }
  const auto sums = [&](int begin, int end) {
    code_sums_columns<kBits, kRows>(
        [&](int c) { return scaled + c / group; }, ld, per_row, record, offset, count, begin, end, ahead,
        [&](int r, int c, V sum) {
          update(out + r * ldo + c, end - c, [&](V x) { return x * factor[r] + (sum + bias[r][c / group]); });
        });
  };
  if (group % W == 0) return sums(0, record.dim);
  for (int g = 0; g < per_row; ++g) sums(g * group, (g + 1) * group);  // no vector spans two groups
}

template <int kBits, int kRows>
inline void accumulate_along_tokens(const Record& record, int offset, int count, const float* p, const float* factor,
                                    float* out, int ldo, Prefetcher& ahead) {
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
        [&](int) { return p + done; }, kBlockKeys, 1, record, offset + done, n, 0, record.dim, ahead,
        [&](int r, int c, V sum) {
          const float keep = done == 0 ? factor[r] : 1.0f;
          update(out + r * ldo + c, record.dim - c,
                 [&](V x) { return x * keep + (sum * load(scale + c) + load(min + c) * weights[r]); });
        });
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
