// Scores over a run of tokens of one quantized record.
#pragma once

#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

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
                           float* s, Prefetcher& ahead) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : kManyRegisters ? 4 : kRows == 4 ? 2 : 4;
  for (int j = 0; j < count; j += kKeys) {
    ahead.step();
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
        case 1: code_dots_rows<kBits, 1>(scaled, kMaxDim, bias, record, offset + done, n, to, ahead); break;
        case 2: code_dots_rows<kBits, 2>(scaled, kMaxDim, bias, record, offset + done, n, to, ahead); break;
        case 3: code_dots_rows<kBits, 3>(scaled, kMaxDim, bias, record, offset + done, n, to, ahead); break;
        default: code_dots_rows<kBits, 4>(scaled, kMaxDim, bias, record, offset + done, n, to, ahead); break;
      }
    }
  });
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
