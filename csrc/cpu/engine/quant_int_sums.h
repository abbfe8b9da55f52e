// Weighted sums of values by integer multiply-adds: the weights p (times the
// scale of a token and group of channels) of a block of tokens become 16-bit
// integers, the sums over tokens are exact, one factor and one constant finish
// them.
//
// The codes of four tokens are brought side by side first, once for all rows:
// then a multiply-add of pairs sums over tokens. Instructions for 128 codes of
// 2 bits, R rows (AVX2): 3 to interleave, 14 to unpack, R * (8 multiply-adds, 8
// adds).
#pragma once

#include "cpu/engine/quant_int.h"
#include "cpu/engine/quant_sums.h"

namespace kvk::cpu::KVK_LEVEL {

#if defined(__AVX2__)

inline constexpr int kUnit = kSumBytes;  // bytes of a row whose columns are summed together
inline constexpr int kUnitStride = kBlockKeys / 4 * 32;
inline constexpr int kMaxUnits = kMaxDim / kUnit;

// Whether units of bytes divide the groups of channels (or the row, where groups run along tokens).
inline bool int_sums_fit(const Record& record) {
  const int channels = record.part.along_tokens ? record.dim : record.part.group;
  const int bits = record.part.bits == 3 ? 4 : record.part.bits;  // as codes_of() has them
  return channels * bits % (8 * kUnit) == 0;
}

// tile[unit][t / 4]: 8 columns of bytes x 4 tokens. Tokens behind the last
// repeat it: their weights are 0.
inline void interleave_tokens(const Codes& codes, int token, int count, uint8_t* tile) {
  const int bytes = static_cast<int>(codes.row_bytes);
  const uint8_t* first = codes.row(token);
  for (int t = 0; t < count; t += 4, first += 4 * bytes) {
    const uint8_t* rows[4] = {first, first + bytes, first + 2 * bytes, first + 3 * bytes};
    if (t + 4 > count) {
      for (int e = 1; e < 4; ++e) rows[e] = codes.row(token + std::min(t + e, count - 1));
    }
    uint8_t* to = tile + t / 4 * 32;
    int at = 0;
    for (; at + 32 <= bytes; at += 32) {
      interleave_rows(rows, to + at / kUnit * kUnitStride, kUnitStride);
      for (const uint8_t*& row : rows) row += 32;
    }
    for (; at < bytes; at += kUnit) {
      interleave_rows_8(rows, to + at / kUnit * kUnitStride);
      for (const uint8_t*& row : rows) row += kUnit;
    }
  }
}

// Sums over `quads` times four tokens of one unit, of codes [kFirst, kFirst +
// kCount) of each byte.
template <int kBits, int kRows, int kFirst, int kCount>
inline void unit_sums(const uint8_t* unit, int quads, const int16_t* weights, int ldw, Sums (*sums)[8 / kBits]) {
  Sums acc[kRows][kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kCount; ++i) acc[i / kCount][i % kCount] = zero_sums();
  for (int t = 0; t < quads; ++t) {
    const __m256i bytes = load_bytes(unit + t * 32);
    Words even[kCount], odd[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      even[i] = even_rows<kBits>(bytes, kFirst + i);
      odd[i] = odd_rows<kBits>(bytes, kFirst + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Words a = weight_pair(weights + r * ldw + 4 * t), b = weight_pair(weights + r * ldw + 4 * t + 2);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        acc[r][i] = _mm256_add_epi32(acc[r][i], _mm256_add_epi32(dot2(even[i], a), dot2(odd[i], b)));
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kCount; ++i) sums[i / kCount][kFirst + i % kCount] = acc[i / kCount][i % kCount];
}

// Weights of a block for some rows: [groups] of each, groups a multiple of 4.
struct IntWeights {
  alignas(64) int16_t words[kMaxGroups * kBlockKeys];  // [group][token]
  IntRow row[kMaxGroups];
  float constant[kMaxGroups];  // sum of p * min
};

// sums[r * kMaxDim + c] = the sum of weight r times code c over all tokens, times the row's factor. weights: one for each row;
// groups of `group` channels.
template <int kBits, int kRows>
[[gnu::noinline]] void int_sums(const uint8_t* tile, int units, int count, const IntWeights* weights, int group,
                                float* sums, Prefetcher& ahead) {
  constexpr int kPerByte = 8 / kBits, kUnitColumns = kUnit * kPerByte;
  constexpr int ldw = sizeof(IntWeights) / sizeof(int16_t);
  const int quads = (count + 3) / 4;
  int g = 0, end = group;
  for (int u = 0; u < units; ++u) {
    ahead.step();
    if (u * kUnitColumns == end) {
      ++g;
      end += group;
    }
    const int16_t* w = weights->words + g * kBlockKeys;
    Sums exact[kRows][kPerByte];
    const uint8_t* unit = tile + u * kUnitStride;
    if constexpr (kPerByte == 4 && kRows > 2) {
      unit_sums<kBits, kRows, 0, 2>(unit, quads, w, ldw, exact);
      unit_sums<kBits, kRows, 2, 2>(unit, quads, w, ldw, exact);
    } else {
      unit_sums<kBits, kRows, 0, kPerByte>(unit, quads, w, ldw, exact);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float factor = weights[r].row[g].factor;
      V8 x[kPerByte];
#pragma GCC unroll 4
      for (int i = 0; i < kPerByte; ++i) x[i] = to_floats(exact[r][i]) * factor;
      interleave<kPerByte>(x);
      float* to = sums + r * kMaxDim + u * kUnitColumns;
#pragma GCC unroll 4
      for (int i = 0; i < kPerByte; ++i) x[i].copy_to(to + 8 * i, stdx::element_aligned);
    }
  }
}

inline void int_sums(const Codes& codes, const uint8_t* tile, int count, const IntWeights* weights, int num_rows,
                     int group, float* sums, Prefetcher& ahead) {
  const int units = static_cast<int>(codes.row_bytes) / kUnit;
  with_code_bits(codes.bits, [&](auto bits) {
    with_rows(num_rows, [&](auto n) { int_sums<bits(), n()>(tile, units, count, weights, group, sums, ahead); });
  });
}

// scale (or min) [count][per_row] to floats [per_row][kBlockKeys], zeros up to
// a multiple of 16 behind count.
inline void widen_by_group(const f16* from, int count, int per_row, float* to) {
  alignas(64) float rows[kBlockKeys * kMaxGroups];
  if (per_row == 1) {
    widen(from, count, to);
  } else if (per_row == 4 && count % 16 == 0) {
    alignas(64) int16_t words[64];
    for (int t = 0; t < count; t += 16) {
      into_code_order<4>(reinterpret_cast<const int16_t*>(from + t * 4), words);
      for (int g = 0; g < 4; ++g) widen(reinterpret_cast<const f16*>(words) + 16 * g, 16, to + g * kBlockKeys + t);
    }
  } else {
    widen(from, count * per_row, rows);
    for (int g = 0; g < per_row; ++g) {
      for (int t = 0; t < count; ++t) to[g * kBlockKeys + t] = rows[t * per_row + g];
    }
  }
  for (int g = 0; g < per_row; ++g) {
    std::fill(to + g * kBlockKeys + count, to + g * kBlockKeys + (count + 15) / 16 * 16, 0.0f);
  }
}

// p [count], zeros up to n behind it.
inline void copy_weights(const float* p, int count, int n, float* to) {
  int t = 0;
  for (; t + W <= count; t += W) store(load(p + t), to + t);
  std::fill(to + t, to + n, 0.0f);
  std::copy_n(p + t, count - t, to + t);
}

// V per token: the scale of each token and group enters the weights. Groups are of whole vectors. Returns the rows whose weights
// are no integers, as bits.
inline unsigned int_accumulate_along_channels(const Record& record, const Codes& codes, int offset, int count,
                                              const WeightedRows& rows, Prefetcher& ahead) {
  const int per_row = record.groups_per_row(), group = record.part.group, n = (count + 15) / 16 * 16;
  alignas(64) float scale[kMaxGroups * kBlockKeys], min[kMaxGroups * kBlockKeys], sums[4 * kMaxDim];
  alignas(64) uint8_t tile[kMaxUnits * kUnitStride];
  IntWeights weights[4];
  interleave_tokens(codes, 0, count, tile);
  widen_by_group(record.scale + int64_t{offset} * per_row, count, per_row, scale);
  widen_by_group(record.min + int64_t{offset} * per_row, count, per_row, min);
  unsigned unfit = 0;
  for (int r = 0; r < rows.num_rows; ++r) {
    alignas(64) float own[kBlockKeys], scaled[4 * kBlockKeys];
    copy_weights(rows.p + r * kBlockKeys, count, n, own);
    for (int first = 0; first < per_row; first += 4) {
      const int groups = std::min(4, per_row - first);
      V constant[4] = {0.0f, 0.0f, 0.0f, 0.0f}, largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int g = 0; g < groups; ++g) {
        const float *scales = scale + (first + g) * kBlockKeys, *mins = min + (first + g) * kBlockKeys;
        V top = 0.0f, sum = 0.0f;
        for (int t = 0; t < n; t += W) {
          const V weight = load(own + t), product = weight * load(scales + t);
          store(product, scaled + g * kBlockKeys + t);
          top = larger_magnitude(product, top);
          sum += weight * load(mins + t);
        }
        largest[g] = top;
        constant[g] = sum;
      }
      int16_t* words = weights[r].words + first * kBlockKeys;
      to_row_pairs(scaled, kBlockKeys, groups, n, largest, words, kBlockKeys, weights[r].row + first);
      for (int g = 0; g < groups; ++g) unfit |= static_cast<unsigned>(!weights[r].row[first + g].fit) << r;
      sum_lanes(constant[0], constant[1], constant[2], constant[3], weights[r].constant + first);
    }
  }
  int_sums(codes, tile, count, weights, rows.num_rows, group, sums, ahead);
  for (int r = 0; r < rows.num_rows; ++r) {
    if (unfit >> r & 1) continue;
    for (int g = 0; g < per_row; ++g) {
      const float* sum = sums + r * kMaxDim + g * group;
      update_columns(rows.out + r * rows.ldo + g * group, group, [&](V before, int c) {
        return before * rows.factor[r] + (load(sum + c) + weights[r].constant[g]);
      });
    }
  }
  return unfit;
}

// V per channel, tokens [begin, begin + count) of the codes, which share their scales: scale and min enter the finished sums.
inline unsigned int_accumulate_token_group(const Record& record, const Codes& codes, int offset, int begin, int count,
                                           const WeightedRows& rows, Prefetcher& ahead) {
  const int dim = record.dim, n = (count + 15) / 16 * 16;
  const int64_t at = int64_t{(offset + begin) / record.part.group} * dim;
  alignas(64) float scale[kMaxDim + W], min[kMaxDim + W], sums[4 * kMaxDim + W], own[4 * kBlockKeys];
  alignas(64) uint8_t tile[kMaxUnits * kUnitStride];
  alignas(64) int16_t words[4 * kBlockKeys];
  IntWeights weights[4];
  IntRow fits[4];
  float totals[4];
  interleave_tokens(codes, begin, count, tile);
  widen(record.scale + at, dim, scale);
  widen(record.min + at, dim, min);
  V total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int r = 0; r < rows.num_rows; ++r) {
    float* mine = own + r * kBlockKeys;
    copy_weights(rows.p + r * kBlockKeys + begin, count, n, mine);
    V sum = 0.0f, top = 0.0f;
    for (int t = 0; t < n; t += W) {
      sum += load(mine + t);
      top = larger_magnitude(load(mine + t), top);
    }
    total[r] = sum;
    largest[r] = top;
  }
  to_row_pairs(own, kBlockKeys, rows.num_rows, n, largest, words, kBlockKeys, fits);
  sum_lanes(total[0], total[1], total[2], total[3], totals);
  unsigned unfit = 0;
  for (int r = 0; r < rows.num_rows; ++r) {
    std::copy_n(words + r * kBlockKeys, n, weights[r].words);
    weights[r].row[0] = fits[r];
    unfit |= static_cast<unsigned>(!fits[r].fit) << r;
  }
  int_sums(codes, tile, count, weights, rows.num_rows, dim, sums, ahead);
  for (int r = 0; r < rows.num_rows; ++r) {
    if (unfit >> r & 1) continue;
    const float* sum = sums + r * kMaxDim;
    update_columns(rows.out + r * rows.ldo, dim, [&](V before, int c) {
      return before * rows.factor[r] + (load(sum + c) * load(scale + c) + load(min + c) * totals[r]);
    });
  }
  return unfit;
}

// The rows named by `unfit`, by floats.
inline void accumulate_unfit(const Record& record, int offset, int count, const WeightedRows& rows, unsigned unfit,
                             Prefetcher& ahead) {
  for (int r = 0; r < rows.num_rows; ++r) {
    if (unfit >> r & 1) accumulate_floats(record, offset, count, rows.part(r, 1), ahead);
  }
}

inline void accumulate_integers(const Record& record, int offset, int count, const WeightedRows& rows,
                                Prefetcher& ahead) {
  alignas(64) uint8_t narrow[kCodesTile];
  const Codes codes = codes_of(record, offset, count, Raise::kNo, narrow);
  if (!record.part.along_tokens) {
    const unsigned unfit = int_accumulate_along_channels(record, codes, offset, count, rows, ahead);
    return accumulate_unfit(record, offset, count, rows, unfit, ahead);
  }
  static constexpr float kOnes[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  each_token_group(record, offset, count, [&](int begin, int n) {
    WeightedRows group = rows;
    if (begin > 0) group.factor = kOnes;
    const unsigned unfit = int_accumulate_token_group(record, codes, offset, begin, n, group, ahead);
    group.p += begin;
    accumulate_unfit(record, offset + begin, n, group, unfit, ahead);
  });
}

#endif

}  // namespace kvk::cpu::KVK_LEVEL
