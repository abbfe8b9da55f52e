// Making and reading records of bitmaps at one instruction-set level. The bytes are the same at every level: keys are compared
// as integers, elements are moved, and the only arithmetic is the rotation (hadamard_rows.h).
//
// Bytes of compressing a row of D 16-bit elements: 2 D read, 2 keep + D / 8 written. Work with AVX2, 16 rows at once: for each of
// 15 bits of a key a comparison and a subtraction for every 32 elements; 5 instructions to transpose them before, 9 to compare
// them with what was found, then 7 for every 8 to move them together. Measured on Zen 4 for 128 elements in cache, one core:
// 35 ns, of which 5 to transpose, 14 the bits, 6 to compare, 9 to move; so bound by instructions and not by memory.
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/hadamard_rows.h"
#include "cpu/kernels.h"
#include "cpu/simd_bitmap.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// The smaller sizes of a row's bitmap as constants, so that it stays in registers.
template <int kBytes>
void pick(const uint8_t (*bytes)[kMaxRow], int dim, int n, uint64_t* picked) {
  switch ((dim + 63) / 64) {
    case 1: return pick_largest<kBytes, 1>(bytes, dim, n, picked);
    case 2: return pick_largest<kBytes, 2>(bytes, dim, n, picked);
    case 3: return pick_largest<kBytes, 3>(bytes, dim, n, picked);
    default: return pick_largest<kBytes, 4>(bytes, dim, n, picked);
  }
}

// Zeros up to a whole run of 64.
template <int kBytes>
void clear_behind(uint8_t (&bytes)[kBytes][kMaxRow], int dim) {
  for (auto& row : bytes) std::fill(row + dim, row + (dim + 63) / 64 * 64, uint8_t{0});
}

// By magnitude: the 15 bits below the sign, as an integer. NaN comes before infinity, then the numbers.
void pick_by_magnitude(const uint16_t* row, int dim, int n, uint64_t* picked) {
  alignas(64) uint8_t bytes[2][kMaxRow];
  clear_behind(bytes, dim);
  for (int i = 0; i < dim; ++i) bytes[0][i] = static_cast<uint8_t>(row[i] >> 8 & 0x7f);
  for (int i = 0; i < dim; ++i) bytes[1][i] = static_cast<uint8_t>(row[i] & 0xff);
  pick<2>(bytes, dim, n, picked);
}

// By score: as numbers, so +0 is -0; NaN comes before infinity.
void pick_by_score(const float* scores, int dim, int n, uint64_t* picked) {
  alignas(64) uint8_t bytes[4][kMaxRow];
  clear_behind(bytes, dim);
  for (int i = 0; i < dim; ++i) {
    const float x = scores[i];
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    uint32_t key = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    if (x == 0.0f) key = 0x80000000u;
    if (x != x) key = 0xffffffffu;
    for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(key >> (24 - 8 * b));
  }
  pick<4>(bytes, dim, n, picked);
}

void pick_by_mask(const uint8_t* mask, int dim, uint64_t* picked) {
  std::fill(picked, picked + kMaxWords, 0);
  for (int i = 0; i < dim; ++i) picked[i / 64] |= static_cast<uint64_t>(mask[i] != 0) << i % 64;
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float, AlignedDelete>;

Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// f(bf16{}) or f(f16{}).
// Floats to values, each rounded as a cast does; a NaN becomes the one of that name, so that all bits are defined.
template <class T>
void round_row(const float* from, int dim, uint16_t* to) {
  T* out = reinterpret_cast<T*>(to);
  for (int d = 0; d < dim; d += W) {
    const int n = std::min(W, dim - d);
    V x = n == W ? load(from + d) : load_partial(from + d, n);
    stdx::where(x != x, x) = V(std::numeric_limits<float>::quiet_NaN());
    if (n == W) {
      store(x, out + d);
    } else {
      store_partial(x, out + d, n);
    }
  }
}

// Rows of a block as values: a pointer to where they lie already, or a copy.
class ValueRows {
 public:
  explicit ValueRows(const SparseBlock& block)
      : b_(block), dim_(static_cast<int>(block.dim)), hadamard_(block.part.rotate ? dim_ : 1, false),
        scratch_(block.part.rotate ? new_floats(HadamardRow::scratch_floats(dim_) + padded(dim_)) : nullptr) {}

  // A row of one head is too short a run of memory for the machine to fetch the next by itself. Behind the last token lie
  // those of the next block.
  void fetch(int64_t token) const {
    const void* rows = b_.x;
    if (token >= b_.tokens) {
      rows = b_.ahead;
      token -= b_.tokens;
      if (rows == nullptr || token >= b_.tokens) return;
    }
    const int64_t size = element_size(b_.dtype);
    const char* x = static_cast<const char*>(rows) + token * b_.token_stride * size;
    for (int64_t at = 0; at < dim_ * size; at += 64) prefetch_l2(x + at);
  }

  // `lane`: of the rows that are held at once.
  const uint16_t* operator()(int64_t token, int lane = 0) {
    const char* x = static_cast<const char*>(b_.x) + token * b_.token_stride * element_size(b_.dtype);
    if (b_.dtype != DType::f32 && !b_.part.rotate) return reinterpret_cast<const uint16_t*>(x);
    const float* from = reinterpret_cast<const float*>(x);
    if (b_.part.rotate) {
      float* wide = scratch_.get() + HadamardRow::scratch_floats(dim_);
      const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim_)));
      if (b_.dtype == DType::f32) {
        hadamard_.run(from, wide, scale, scratch_.get());
      } else {
        with_value(b_.dtype, [&](auto element) {
          hadamard_.run(reinterpret_cast<const decltype(element)*>(x), wide, scale, scratch_.get());
        });
      }
      from = wide;
    }
    with_value(b_.value_dtype, [&](auto element) { round_row<decltype(element)>(from, dim_, rows_[lane]); });
    return rows_[lane];
  }

 private:
  const SparseBlock& b_;
  int dim_;
  HadamardRow hadamard_;
  Floats scratch_;
  alignas(64) uint16_t rows_[kRowLanes][kMaxRow];
};

}  // namespace

void compress_block(const SparseBlock& b) {
  const int dim = static_cast<int>(b.dim), keep = b.part.keep;
  const int64_t row_bytes = keep * 2;
  ValueRows rows(b);
  constexpr int kAhead = 8;  // rows: about a microsecond
  alignas(64) uint8_t last[2 * kMaxRow + 16];
  const auto write = [&](int64_t t, const uint16_t* row, const uint64_t* picked, auto width) {
    // A vector may be written behind a row: the next one overwrites it, and behind the last lie the bitmaps.
    uint8_t* values = b.values + t * row_bytes;
    const bool is_last = t + 1 == b.tokens;
    uint8_t* to = is_last ? last : values;
    squeeze_row(row, picked, width, to);
    if (b.select != nullptr && b.select_dtype != DType::f32) {
      int64_t used = 0;
      for (int w = 0; w < kMaxWords; ++w) used += 2 * std::popcount(picked[w]);
      std::fill(to + used, to + row_bytes, uint8_t{0});
    }
    if (is_last) std::memcpy(values, last, static_cast<size_t>(row_bytes));
    std::memcpy(b.bitmap + t * (width / 8), picked, static_cast<size_t>(width / 8));
  };
  int64_t t = 0;
#if defined(__AVX2__)
  // Many rows at once; fewer than half of a vector of them are faster one by one.
  const auto together = [&](auto width) {
    for (; t + kRowLanes / 2 <= b.tokens; t += kRowLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kRowLanes, b.tokens - t));
      const uint16_t* row[kRowLanes];
      int16_t nth[kRowLanes];
      for (int r = 0; r < kRowLanes; ++r) row[r] = r < count ? rows(t + r, r) : row[0];
      // Through the search the next rows are fetched, and the lines that these rows are written to: stores wait for their lines
      // one after the other. In a burst it would fill the queue of misses and stop the search.
      static_assert(kRowLanes == kHighBits + kLowBits + 1);
      int64_t next = t + kRowLanes;
      uint8_t *line = b.values + t * row_bytes, *const end = b.values + (t + count) * row_bytes;
      rows.fetch(next);
      nth_largest(row, width, keep, nth, [&] {
        rows.fetch(++next);
        const int64_t lines = row_bytes / 64 + 1;  // of one row
        for (int64_t i = 0; i < lines && line < end; ++i, line += 64) prefetch_to_write(line);
      });
      for (int r = 0; r < count; ++r) {
        uint64_t picked[kMaxWords];
        pick_down_to(row[r], width, keep, nth[r], picked);
        write(t + r, row[r], picked, width);
      }
    }
  };
  if (b.select == nullptr) {  // the usual widths as constants
    switch (dim) {
      case 64: together(std::integral_constant<int, 64>()); break;
      case 128: together(std::integral_constant<int, 128>()); break;
      default: together(dim); break;
    }
  }
#endif
  for (; t < b.tokens; ++t) {
    rows.fetch(t + kAhead);
    const uint16_t* row = rows(t);
    const char* select = b.select + (b.select == nullptr ? 0 : t * b.select_stride);
    uint64_t picked[kMaxWords] = {};
    if (b.select == nullptr) {
      pick_by_magnitude(row, dim, keep, picked);
    } else if (b.select_dtype == DType::f32) {
      pick_by_score(reinterpret_cast<const float*>(select), dim, keep, picked);
    } else if (b.select_dtype == DType::boolean) {
      pick_by_mask(reinterpret_cast<const uint8_t*>(select), dim, picked);
    } else {
      std::memcpy(picked, select, static_cast<size_t>(dim / 8));
    }
    write(t, row, picked, dim);
  }
}

void decompress_block(const SparseBlock& b) {
  const int dim = static_cast<int>(b.dim);
  const Floats scratch = b.part.rotate ? new_floats(HadamardRow::scratch_floats(dim) + padded(dim)) : nullptr;
  const HadamardRow hadamard(b.part.rotate ? dim : 1, true);
  for (int64_t t = 0; t < b.tokens; ++t) {
    uint16_t* row = static_cast<uint16_t*>(b.x) + t * b.token_stride;
    expand_row(b.values + t * b.part.keep * 2, b.bitmap + t * (dim / 8), dim, row);
    if (!b.part.rotate) continue;
    float* wide = scratch.get() + HadamardRow::scratch_floats(dim);
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
    with_value(b.value_dtype, [&](auto element) {
      using T = decltype(element);
      hadamard.run(reinterpret_cast<const T*>(row), wide, scale, scratch.get());
      round_row<T>(wide, dim, row);
    });
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
