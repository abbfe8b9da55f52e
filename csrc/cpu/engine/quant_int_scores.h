// Scores by integer dot products, keys quantized per channel: q * scale of a
// group of tokens becomes 16-bit integers, the dot product with the codes is
// exact, one factor and one constant finish it.
//
// Instructions for 64 codes of one key, R rows (AVX2): 8 to unpack them, and R
// * (4 multiply-adds of pairs, 4 adds); floats take 16 to 32, and R * 8.
#pragma once

#include "cpu/engine/quant_int.h"
#include "cpu/engine/quant_scores.h"

namespace kvk::cpu::KVK_LEVEL {

#if defined(__AVX2__)

// sums[r * kBlockKeys + j] = q_r . codes of token j, for kRows rows; up to 8 /
// kRows - 1 sums behind the last are written.
template <int kBits, int kRows>
inline void int_dots(const int16_t* q, int ldq, const Record& record, int token, int count, int32_t* sums,
                     Prefetcher& ahead) {
  constexpr int kKeys = 8 / kRows;
  for (int j = 0; j < count; j += kKeys) {
    if (j % 8 == 0) ahead.step();
    const uint8_t* keys[kKeys];
    for (int e = 0; e < kKeys; ++e) keys[e] = record.row(token + std::min(j + e, count - 1));
    Sums acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = zero_sums();
    for (int c = 0, left = record.dim; left > 0; ++c, left -= kChunk) {
#pragma GCC unroll 8
      for (int e = 0; e < kKeys; ++e) {
        Words codes[4];
        unpack_chunk<kBits>(keys[e], c, left, codes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[r * kKeys + e] = _mm256_add_epi32(acc[r * kKeys + e], dot_chunk(codes, q + r * ldq + c * kChunk));
        }
      }
    }
    int32_t eight[8];
    store_lane_sums(acc, eight);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(sums + r * kBlockKeys + j, eight + r * kKeys, kKeys * sizeof(int32_t));
    }
  }
}

// A few query rows against a few groups of tokens, up to 4 in all: worked out
// together, because each by itself is one chain of dependent steps.
template <int kBits>
class IntQueries {
 public:
  explicit IntQueries(int dim) : dim_(dim), chunks_((dim + kChunk - 1) / kChunk) {
    for (int i = 0; i < 4; ++i) {
      std::fill(scaled_ + i * kMaxDim + dim / 16 * 16, scaled_ + i * kMaxDim + (dim + 15) / 16 * 16, 0.0f);
      std::fill(plain_ + i * kMaxDim + dim, plain_ + i * kMaxDim + chunks_ * kChunk, int16_t{0});
    }
  }

  // Rows of q for the slots from `first`; scale, min: of their group of tokens.
  template <int kRows>
  void set(int first, const float* q, int ldq, const f16* scale, const f16* min) {
    V largest[kRows], constant[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) largest[r] = constant[r] = V(0.0f);
    const auto step = [&](int d, V scales, V mins) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V x = load(q + r * ldq + d), product = x * scales;
        store(product, scaled_ + (first + r) * kMaxDim + d);
        largest[r] = larger_magnitude(product, largest[r]);
        constant[r] += x * mins;
      }
    };
    constexpr auto kMid = static_cast<float>(kCentre<kBits>);
    int d = 0;
    for (; d + W <= dim_; d += W) {
      const V scales = load(scale + d);
      step(d, scales, load(min + d) + scales * kMid);
    }
    if (d < dim_) {
      const V scales = load_half(scale + d);
      step(d, scales, load_half(min + d) + scales * kMid);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      largest_[first + r] = largest[r];
      constant_[first + r] = constant[r];
    }
  }

  void finish(int count) {
    for (int i = count; i < 4; ++i) largest_[i] = constant_[i] = V(0.0f);
    to_words(scaled_, kMaxDim, count, (dim_ + 15) / 16 * 16, largest_, plain_, kMaxDim, row_);
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < chunks_; ++c) {
        into_code_order<kBits>(plain_ + i * kMaxDim + c * kChunk, words_ + i * kMaxDim + c * kChunk);
      }
    }
    sum_lanes(constant_[0], constant_[1], constant_[2], constant_[3], constants_);
  }

  bool fit(int i) const { return row_[i].fit; }

  // sums[r * kBlockKeys + j] = (slot first + r) . codes of token j, `rows` of
  // them; eight sums behind the last are written.
  void dots(int first, int rows, const Record& record, int token, int count, int32_t* sums, Prefetcher& ahead) const {
    for (int r = 0; r < rows;) {
      const int16_t* q = words_ + (first + r) * kMaxDim;
      int32_t* to = sums + r * kBlockKeys;
      if (rows - r >= 4) {
        int_dots<kBits, 4>(q, kMaxDim, record, token, count, to, ahead);
        r += 4;
      } else if (rows - r >= 2) {
        int_dots<kBits, 2>(q, kMaxDim, record, token, count, to, ahead);
        r += 2;
      } else {
        int_dots<kBits, 1>(q, kMaxDim, record, token, count, to, ahead);
        r += 1;
      }
    }
  }

  void scores(int i, const int32_t* sums, int count, float* s) const {
    const int32_t centre = kCentre<kBits> * row_[i].sum;
    const float factor = row_[i].factor, constant = constants_[i];
    for (int j = 0; j < count; ++j) s[j] = static_cast<float>(sums[j] - centre) * factor + constant;
  }

 private:
  int dim_, chunks_;
  alignas(64) float scaled_[4 * kMaxDim];
  alignas(64) int16_t plain_[4 * kMaxDim], words_[4 * kMaxDim];
  V largest_[4], constant_[4];
  float constants_[4];
  IntRow row_[4];
};

template <int kBits>
inline void int_scores_along_tokens(const Record& record, int offset, int count, const float* q, int ldq, int num_rows,
                                    float* s, Prefetcher& ahead) {
  struct Group {
    int begin, count;
  } groups[kBlockKeys];
  int num_groups = 0;
  each_token_group(record, offset, count, [&](int done, int n) { groups[num_groups++] = {done, n}; });

  alignas(64) int32_t sums[4 * kBlockKeys + 8];
  IntQueries<kBits> queries(record.dim);
  const int together = num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1;  // groups
  for (int g = 0; g < num_groups; g += together) {
    const int some = std::min(together, num_groups - g);
    for (int first = 0; first < num_rows; first += 4) {
      const int rows = std::min(4, num_rows - first);
      const float* qr = q + first * ldq;
      for (int i = 0; i < some; ++i) {
        const int64_t at = int64_t{(offset + groups[g + i].begin) / record.part.group} * record.dim;
        switch (rows) {
          case 1: queries.template set<1>(i, qr, ldq, record.scale + at, record.min + at); break;
          case 2: queries.template set<2>(i * 2, qr, ldq, record.scale + at, record.min + at); break;
          case 3: queries.template set<3>(i * 3, qr, ldq, record.scale + at, record.min + at); break;
          default: queries.template set<4>(i * 4, qr, ldq, record.scale + at, record.min + at); break;
        }
      }
      queries.finish(some * rows);
      for (int i = 0; i < some; ++i) {
        const Group& group = groups[g + i];
        queries.dots(i * rows, rows, record, offset + group.begin, group.count, sums, ahead);
        for (int r = 0; r < rows; ++r) {
          float* to = s + (first + r) * kBlockKeys + group.begin;
          if (queries.fit(i * rows + r)) {
            queries.scores(i * rows + r, sums + r * kBlockKeys, group.count, to);
          } else {
            scores_along_tokens<kBits>(record, offset + group.begin, group.count, qr + r * ldq, ldq, 1, to, ahead);
          }
        }
      }
    }
  }
}

#endif

}  // namespace kvk::cpu::KVK_LEVEL
