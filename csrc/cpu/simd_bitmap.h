// Rows of 16-bit elements and bitmaps: picking the largest, and moving the picked ones together and apart again. Bit i of a
// bitmap, low bits first, stands for channel i; eight channels at a time are one byte shuffle with an index from its table.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// f(an element of the dtype of values).
template <class F>
inline void with_value(DType dtype, F&& f) {
  dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

inline constexpr int kMaxRow = 256;             // channels
inline constexpr int kMaxWords = kMaxRow / 64;  // of a row's bitmap

// For every byte of a bitmap the byte shuffle of eight 16-bit elements: `apart` puts the k-th element where the k-th set bit is
// and zeros elsewhere, `together` puts the picked ones at the front. 4 KiB each.
struct ByteShuffles {
  alignas(64) uint8_t apart[256][16];
  alignas(64) uint8_t together[256][16];
  constexpr ByteShuffles() : apart{}, together{} {
    for (int bits = 0; bits < 256; ++bits) {
      int next = 0;
      for (int i = 0; i < 16; ++i) apart[bits][i] = together[bits][i] = 0x80;  // gives 0
      for (int i = 0; i < 8; ++i) {
        if ((bits >> i & 1) == 0) continue;
        for (int half = 0; half < 2; ++half) {
          apart[bits][2 * i + half] = static_cast<uint8_t>(2 * next + half);
          together[bits][2 * next + half] = static_cast<uint8_t>(2 * i + half);
        }
        ++next;
      }
    }
  }
};
inline constexpr ByteShuffles kByteShuffles;

// to[i] = from[control[i]] for 16 bytes; 0 where control[i] has its top bit.
inline void shuffle_16_bytes(const void* from, const uint8_t* control, void* to) {
#if defined(__SSSE3__)
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(from));
  const __m128i y = _mm_shuffle_epi8(x, _mm_load_si128(reinterpret_cast<const __m128i*>(control)));
  _mm_storeu_si128(static_cast<__m128i*>(to), y);
#else
  uint8_t x[16], y[16];
  std::memcpy(x, from, 16);
  for (int i = 0; i < 16; ++i) y[i] = control[i] < 16 ? x[control[i]] : 0;
  std::memcpy(to, y, 16);
#endif
}

// 64 bits of a row's bitmap from channel 64 * word; zeros behind its end.
inline uint64_t bitmap_word(const uint8_t* bitmap, int dim, int word) {
  uint64_t x = 0;
  if (dim - 64 * word >= 64) {
    std::memcpy(&x, bitmap + 8 * word, 8);
  } else {
    std::memcpy(&x, bitmap + 8 * word, static_cast<size_t>(dim / 8 - 8 * word));
  }
  return x;
}

// Byte i: twice the number of bits set below byte i, the offset in bytes of its first element among the word's. The bits are
// counted in all bytes at once; a multiplication adds those below.
inline uint64_t element_offsets(uint64_t bits) {
  uint64_t x = bits - (bits >> 1 & 0x5555555555555555);
  x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return (x * 0x0101010101010101) << 9;
}

// A row of `dim` elements from its kept values and its bitmap. Reads 16 bytes from any value on, and behind the last one.
inline void expand_row(const uint8_t* values, const uint8_t* bitmap, int dim, uint16_t* to) {
  for (int word = 0; 64 * word < dim; ++word) {
    const uint64_t bits = bitmap_word(bitmap, dim, word);
    const uint64_t offsets = element_offsets(bits);
    const int bytes = std::min(8, dim / 8 - 8 * word);
    const auto eight = [&](int i) __attribute__((always_inline)) {
      shuffle_16_bytes(values + (offsets >> 8 * i & 0xff), kByteShuffles.apart[bits >> 8 * i & 0xff],
                       to + 64 * word + 8 * i);
    };
    if (bytes == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) eight(i);
    } else {
      for (int i = 0; i < bytes; ++i) eight(i);
    }
    values += 2 * std::popcount(bits);
  }
}

// `count` rows of a record, and where rows of `ld` elements are put apart.
struct RowsApart {
  const uint8_t* values;
  int64_t value_row_bytes;
  const uint8_t* bitmap;
  int64_t bitmap_row_bytes;
  int dim, count;
  uint16_t* to;
  int ld;
};

inline void expand_rows(const RowsApart& rows) {
  for (int j = 0; j < rows.count; ++j) {
    expand_row(rows.values + j * rows.value_row_bytes, rows.bitmap + j * rows.bitmap_row_bytes, rows.dim,
               rows.to + static_cast<int64_t>(j) * rows.ld);
  }
}

// The picked elements of a row, in order. Writes 16 bytes from any value on, and behind the last one.
inline void squeeze_row(const uint16_t* row, const uint64_t* picked, int dim, uint8_t* values) {
  for (int word = 0; 64 * word < dim; ++word) {
    uint64_t bits = picked[word];
#pragma GCC unroll 8
    for (int i = 64 * word; i < std::min(dim, 64 * word + 64); i += 8, bits >>= 8) {
      shuffle_16_bytes(row + i, kByteShuffles.together[bits & 0xff], values);
      values += 2 * std::popcount(bits & 0xff);
    }
  }
}

// Bit i: bit kBit of byte i, of 64.
template <int kBit>
inline uint64_t bit_of_bytes(const uint8_t* p) {
#if defined(__AVX512BW__)
  return _cvtmask64_u64(_mm512_test_epi8_mask(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(1 << kBit))));
#elif defined(__AVX2__)
  const auto half = [](const uint8_t* from) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(x, 7 - kBit)));
  };
  return half(p) | static_cast<uint64_t>(half(p + 32)) << 32;
#elif defined(__SSE2__)
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
    bits |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_slli_epi16(x, 7 - kBit))) << 16 * i;
  }
  return bits;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(p[i] >> kBit & 1) << i;
  return bits;
#endif
}

// The lowest n set bits of x.
inline uint64_t lowest_bits(uint64_t x, int n) {
#if defined(__BMI2__)
  return n >= 64 ? x : _pdep_u64((uint64_t{1} << n) - 1, x);
#else
  uint64_t picked = 0;
  for (int i = 0; i < n && x != 0; ++i, x &= x - 1) picked |= x & (0 - x);
  return picked;
#endif
}

// Picks the n largest of `dim` keys, of equal ones the first. The keys come as their bytes, the highest first: byte b of key i
// is bytes[b][i], and the arrays hold whole runs of 64, zero behind dim. A radix selection bit by bit, without a branch on
// the data: `left` keys are still to be picked among those of `open`, which agree in all higher bits.
template <int kBytes, int kWords>
inline void pick_largest(const uint8_t (*bytes)[kMaxRow], int dim, int n, uint64_t* picked) {
  uint64_t open[kWords];
  int left = n;
#pragma GCC unroll 4
  for (int w = 0; w < kWords; ++w) {
    const int rest = dim - 64 * w;
    open[w] = rest >= 64 ? ~uint64_t{0} : (uint64_t{1} << rest) - 1;
    picked[w] = 0;
  }
  // Returns whether the open keys are as many as are left.
  const auto step = [&](auto bit, const uint8_t* p) __attribute__((always_inline)) {
    uint64_t ones[kWords], plane[kWords];
    int count = 0;
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w) {
      plane[w] = bit_of_bytes<bit()>(p + 64 * w);
      ones[w] = open[w] & plane[w];
      count += std::popcount(ones[w]);
    }
    const bool among_ones = count >= left;
    const uint64_t zeros = among_ones ? 0 : ~uint64_t{0};  // all ones are picked, the rest comes from the zeros
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w) {
      picked[w] |= ones[w] & zeros;
      open[w] &= plane[w] ^ zeros;
    }
    const bool done = count == left;
    left -= among_ones ? 0 : count;
    return done;
  };
  const auto byte = [&](const uint8_t* p) __attribute__((always_inline)) {
    return step(std::integral_constant<int, 7>(), p) || step(std::integral_constant<int, 6>(), p) ||
           step(std::integral_constant<int, 5>(), p) || step(std::integral_constant<int, 4>(), p) ||
           step(std::integral_constant<int, 3>(), p) || step(std::integral_constant<int, 2>(), p) ||
           step(std::integral_constant<int, 1>(), p) || step(std::integral_constant<int, 0>(), p);
  };
  for (int b = 0; b < kBytes; ++b) {
    if (byte(bytes[b])) break;
  }
#pragma GCC unroll 4
  for (int w = 0; w < kWords; ++w) {
    const uint64_t first = lowest_bits(open[w], left);
    picked[w] |= first;
    left -= std::popcount(first);
  }
}

// --- the largest by magnitude, of many rows at once -------------------------------------------------------------------

// Measured against the radix selection, Zen 4, rows of 128, when it still compared words: AVX2 47 ns and 78, AVX-512 47 and 69
// all in all. With the eight lanes of SSE it was the slower one, 108 and 93.
#if defined(__AVX2__)

// A lane for each row.
inline constexpr int kRowLanes = 16;
typedef int16_t RowLanes __attribute__((vector_size(2 * kRowLanes)));
inline constexpr int16_t kMagnitude = 0x7fff;  // of a 16-bit float, as an integer

// to[i][r]: the magnitude of element i of row r, for eight elements. Three rounds of putting words of two vectors between
// each other; the rows from the eighth on are in the upper halves.
inline void transpose_magnitudes(const uint16_t* const* rows, int i, RowLanes* to) {
  __m256i x[8], y[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    const auto eight = [&](int row) { return *reinterpret_cast<const __m128i_u*>(rows[row] + i); };
    x[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(r)), eight(r + 8), 1);
  }
  const auto round = [](const __m256i* from, __m256i* into) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      into[2 * r] = _mm256_unpacklo_epi16(from[r], from[r + 4]);
      into[2 * r + 1] = _mm256_unpackhi_epi16(from[r], from[r + 4]);
    }
  };
  round(x, y);
  round(y, x);
  round(x, y);
#pragma GCC unroll 8
  for (int e = 0; e < 8; ++e) to[e] = bit_cast<RowLanes>(y[e]) & kMagnitude;
}

// Bytes of two elements of all rows: eight rows of the first, the same of the second, then the other rows.
typedef int8_t BytePairs __attribute__((vector_size(2 * kRowLanes)));

// Each clamped to a signed byte.
inline BytePairs pack_pair(RowLanes a, RowLanes b) {
  return bit_cast<BytePairs>(_mm256_packs_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
}

// Sums of the unsigned bytes of each row.
inline RowLanes sum_pairs(BytePairs x) {
  const __m256i bytes = bit_cast<__m256i>(x), zero = _mm256_setzero_si256();
  return bit_cast<RowLanes>(_mm256_add_epi16(_mm256_unpacklo_epi8(bytes, zero), _mm256_unpackhi_epi8(bytes, zero)));
}

// The n-th largest of dim signed bytes of each row, found bit by bit from `lowest` up: the largest number that n of them
// reach. Calls meanwhile() once for each bit.
template <class F>
inline RowLanes nth_byte(const BytePairs* bytes, int dim, int n, int bits, int16_t lowest, F&& meanwhile) {
  RowLanes found = RowLanes{} + lowest;
  for (int bit = bits - 1; bit >= 0; --bit) {
    meanwhile();
    const int16_t step = static_cast<int16_t>(1 << bit);
    const RowLanes with = found + step;
    const BytePairs reached = pack_pair(with, with);
    BytePairs below[4] = {};  // how many of the elements are; the byte as the second operand is read from memory
    for (int i = 0; i < dim / 2; i += 4) {
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) below[e] -= reached > bytes[i + e];
    }
    const RowLanes count = sum_pairs(below[0] + below[1] + below[2] + below[3]);
    found = count <= static_cast<int16_t>(dim - n) ? with : found;
  }
  return found;
}

inline constexpr int kHighBits = 7, kLowBits = 8;  // of a magnitude

// nth[r]: the n-th largest magnitude of row r, for kRowLanes rows: its high byte, then the low byte among the elements of that
// high byte. Those above it count as the largest byte, those below as the smallest, which clamping gives. Calls meanwhile()
// once for each bit.
template <class F>
inline void nth_largest(const uint16_t* const* rows, int dim, int n, int16_t* nth, F&& meanwhile) {
  RowLanes keys[kMaxRow];
  BytePairs bytes[kMaxRow / 2];
  for (int i = 0; i < dim; i += 8) {
    transpose_magnitudes(rows, i, keys + i);
    for (int e = i; e < i + 8; e += 2) bytes[e / 2] = pack_pair(keys[e] >> kLowBits, keys[e + 1] >> kLowBits);
  }
  const RowLanes high = nth_byte(bytes, dim, n, kHighBits, 0, meanwhile) << kLowBits;
  constexpr int16_t kHalf = 1 << (kLowBits - 1);
  const RowLanes middle = high + kHalf;
  for (int e = 0; e < dim; e += 2) bytes[e / 2] = pack_pair(keys[e] - middle, keys[e + 1] - middle);
  const RowLanes found = middle + nth_byte(bytes, dim, n, kLowBits, -kHalf, meanwhile);
  std::memcpy(nth, &found, sizeof(found));
}

// Bit i: whether the magnitude of p[i] is greater than x, or equal to it; of 8 elements, and of 32.
struct Compared {
  uint64_t greater, equal;
};
inline Compared compare_8(const uint16_t* p, int16_t x) {
  const __m128i magnitude =
      _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi16(kMagnitude));
  const __m128i at = _mm_set1_epi16(x);
  const __m128i both = _mm_packs_epi16(_mm_cmpgt_epi16(magnitude, at), _mm_cmpeq_epi16(magnitude, at));
  const uint64_t bits = static_cast<uint64_t>(_mm_movemask_epi8(both));
  return {bits & 0xff, bits >> 8};
}
inline Compared compare_32(const uint16_t* p, int16_t x) {
  const auto* from = reinterpret_cast<const __m256i_u*>(p);
  const __m256i magnitude = _mm256_set1_epi16(kMagnitude), at = _mm256_set1_epi16(x);
  const __m256i a = _mm256_and_si256(from[0], magnitude), b = _mm256_and_si256(from[1], magnitude);
  const auto bits = [](__m256i low, __m256i high) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes)));
  };
  return {bits(_mm256_cmpgt_epi16(a, at), _mm256_cmpgt_epi16(b, at)),
          bits(_mm256_cmpeq_epi16(a, at), _mm256_cmpeq_epi16(b, at))};
}

// Picks the n elements of largest magnitude, of equal ones the first, where `nth` is the n-th largest.
inline void pick_down_to(const uint16_t* row, int dim, int n, int16_t nth, uint64_t* picked) {
  uint64_t equal[kMaxWords] = {};
  std::fill(picked, picked + kMaxWords, 0);
  const auto add = [&](int i, Compared c) {
    picked[i / 64] |= c.greater << i % 64;
    equal[i / 64] |= c.equal << i % 64;
  };
  int i = 0;
  for (; i + 32 <= dim; i += 32) add(i, compare_32(row + i, nth));
  for (; i < dim; i += 8) add(i, compare_8(row + i, nth));
  for (int w = 0; 64 * w < dim; ++w) n -= std::popcount(picked[w]);
  for (int w = 0; 64 * w < dim && n > 0; ++w) {
    const uint64_t first = lowest_bits(equal[w], n);
    picked[w] |= first;
    n -= std::popcount(first);
  }
}

#else
inline constexpr int kRowLanes = 1;
#endif

}  // namespace kvk::cpu::KVK_LEVEL
