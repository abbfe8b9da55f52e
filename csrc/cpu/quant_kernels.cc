// Quantizing and dequantizing of blocks at one instruction-set level. Codes, scales and minima are the same bits at every
// level: each step is one IEEE operation in float32 (docs/formats.md), and no product is fused into a sum.
//
// Bytes: every element once, its codes once, 4 bytes a group. Two passes over the elements of a group, the second in cache:
// about 3 and 14 operations for a vector of 16-bit floats, no division: near the bandwidth of memory with AVX2.
#include "cpu/kernels.h"

#include <memory>
#include <new>
#include <vector>

#include "cpu/hadamard_rows.h"
#include "cpu/quant_extremes.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// Codes of n elements of a row, one group each.
template <int kBits, class T>
inline void encode_columns(const T* row, int n, const Groups& groups, uint8_t* to) {
  alignas(64) uint8_t codes[kBatch];
  for (int d = 0; d < n; d += 32, to += 4 * kBits) {
    const auto column = [&](int i, V& min, V& inverse) {
      min = load(groups.min + d + i);
      inverse = load(groups.inverse + d + i);
    };
    const int count = std::min(32, n - d);
    if (count == 32 && !groups.wide && encode_32<kBits>(row + d, column, to)) continue;
    for (int i = d; i < d + count; i += W) {
      encode(load_columns(row + i, n - i), load(groups.min + i), load(groups.top + i), load(groups.divisor + i),
             codes + i - d);
    }
    pack_codes<kBits>(codes, count, to);
  }
}

// Codes of one group of consecutive elements, 16 or more.
template <int kBits, class T>
inline void encode_group(const T* x, int group, const Groups& groups, int at, uint8_t* to) {
  alignas(64) uint8_t codes[kBatch];
  const V mins = groups.min[at], inverses = groups.inverse[at];
  const auto column = [&](int, V& min, V& inverse) {
    min = mins;
    inverse = inverses;
  };
  for (int d = 0; d < group; d += 32, to += 4 * kBits) {
    const int count = std::min(32, group - d);
    if (count == 32 && !groups.wide && encode_32<kBits>(x + d, column, to)) continue;
    for (int i = 0; i < count; i += W) {  // the last two may overlap
      const int from = std::max(0, std::min(i, count - W));
      encode(load_columns(x + d + from, count - from), mins, groups.top[at], groups.divisor[at], codes + from);
    }
    pack_codes<kBits>(codes, count, to);
  }
}

// What the next block will read of its token t, fetched while this one is worked on.
inline void fetch_ahead(const QuantBlock& b, int64_t t) {
  if (b.ahead == nullptr) return;
  const int64_t size = element_size(b.dtype);
  const char* row = static_cast<const char*>(b.ahead) + t * b.token_stride * size;
  for (int64_t i = 0; i < b.dim * size; i += 64) prefetch_l2(row + i);
}

template <int kBits, class T>
void quantize_along_tokens(const QuantBlock& b) {
  const T* x = static_cast<const T*>(b.x);
  const int64_t row_bytes = b.dim * kBits / 8;
  constexpr int kVecs = kManyRegisters ? 8 : 4;
  Groups groups;
  for (int64_t first = 0; first < b.tokens; first += b.part.group) {
    for (int64_t c = 0; c < b.dim; c += kBatch) {
      const int n = static_cast<int>(std::min<int64_t>(kBatch, b.dim - c));
      const T* block = x + first * b.token_stride + c;
      int d = 0;
      if constexpr (kSortable<T>) {
        for (; d + 2 * kWords <= n; d += 2 * kWords) {
          column_extremes_sorted<2>(block + d, b.token_stride, b.part.group, groups, d);
        }
      }
      for (; d + kVecs * W <= n; d += kVecs * W) {
        column_extremes<kVecs>(block + d, b.token_stride, b.part.group, n - d, groups, d);
      }
      for (; d < n; d += W) column_extremes<1>(block + d, b.token_stride, b.part.group, n - d, groups, d);
      const int64_t scales = first / b.part.group * b.dim + c;
      groups.finish(n, b.clip, kBits, b.scale + scales, b.min + scales);
      for (int t = 0; t < b.part.group; ++t) {
        if (c == 0) fetch_ahead(b, first + t);
        encode_columns<kBits>(block + t * b.token_stride, n, groups, b.codes + (first + t) * row_bytes + c * kBits / 8);
      }
    }
  }
}

template <int kBits, class T>
void quantize_along_channels(const QuantBlock& b) {
  const int group = b.part.group;
  const int64_t per_row = b.dim / group, total = b.tokens * per_row;
  Groups groups;
  for (int64_t first = 0; first < total; first += kBatch) {
    const int n = static_cast<int>(std::min<int64_t>(kBatch, total - first));
    // f(i, elements) for the groups of the batch.
    const auto each_group = [&](auto&& f) {
      int64_t token = first / per_row, g = first % per_row;
      const T* row = static_cast<const T*>(b.x) + token * b.token_stride;
      for (int i = 0; i < n; ++i) {
        f(i, row + g * group, g == 0 ? token : -1);
        if (++g < per_row) continue;
        g = 0;
        ++token;
        row += b.token_stride;
      }
    };
    each_group([&](int i, const T* x, int64_t) { row_extremes(x, group, groups, i); });
    groups.finish(n, b.clip, kBits, b.scale + first, b.min + first);
    uint8_t* to = b.codes + first * group * kBits / 8;
    each_group([&](int i, const T* x, int64_t row) {
      if (row >= 0) fetch_ahead(b, row);
      encode_group<kBits>(x, group, groups, i, to + i * group * kBits / 8);
    });
  }
}

template <class T>
inline V saturated(V x) {
  if constexpr (std::is_same_v<T, f16>) {
    stdx::where(x > kF16Max, x) = V(kF16Max);
    stdx::where(x < -kF16Max, x) = V(-kF16Max);
  }
  return x;
}

template <int kBits, class T>
void dequantize_rows(const QuantBlock& b) {
  const int64_t row_bytes = b.dim * kBits / 8;
  alignas(64) float scale[kBatch + W], min[kBatch + W];
  for (int64_t t = 0; t < b.tokens; ++t) {
    const uint8_t* codes = b.codes + t * row_bytes;
    T* row = static_cast<T*>(b.x) + t * b.token_stride;
    for (int64_t c = 0; c < b.dim; c += kBatch) {
      const int n = static_cast<int>(std::min<int64_t>(kBatch, b.dim - c));
      for (int d = 0; d < n; d += 8) {  // a group is a multiple of 8 channels
        const int64_t at = b.part.along_tokens ? t / b.part.group * b.dim + c + d : (t * b.dim + c + d) / b.part.group;
        for (int e = 0; e < 8; ++e) {
          scale[d + e] = to_float(b.scale[at + (b.part.along_tokens ? e : 0)]);
          min[d + e] = to_float(b.min[at + (b.part.along_tokens ? e : 0)]);
        }
      }
      const uint8_t* chunk = codes + c * kBits / 8;
      int d = 0;
      for (; d + W <= n; d += W) {
        store(saturated<T>(load_codes<kBits>(chunk, d) * load(scale + d) + load(min + d)), row + c + d);
      }
      if (d < n) {
        const V x = load_codes_half<kBits>(chunk, d) * load(scale + d) + load(min + d);
        store_partial(saturated<T>(x), row + c + d, n - d);
      }
    }
  }
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float, AlignedDelete>;

Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// f(row, scratch) for the transform of the block's rows; both are fp32 rows of padded(dim) floats.
template <class F>
void rotate_rows(const QuantBlock& b, bool transpose, F&& f) {
  const int dim = static_cast<int>(b.dim);
  const HadamardRow row(dim, transpose);
  const Floats scratch = new_floats(HadamardRow::scratch_floats(dim));
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  for (int64_t t = 0; t < b.tokens; ++t) f(row, t, scale, scratch.get());
}

}  // namespace

void quantize_block(const QuantBlock& block) {
  with_bits(block.part.bits, [&](auto bits) {
    with_dtype(block.dtype, [&](auto element) {
      using T = decltype(element);
      if (block.part.rotate == 0) {
        return block.part.along_tokens ? quantize_along_tokens<bits(), T>(block)
                                       : quantize_along_channels<bits(), T>(block);
      }
      QuantBlock rotated = block;
      const Floats rows = new_floats(block.tokens * block.dim);
      rotate_rows(block, false, [&](const HadamardRow& row, int64_t t, float scale, float* scratch) {
        row.run(static_cast<const T*>(block.x) + t * block.token_stride, rows.get() + t * block.dim, scale, scratch);
      });
      rotated.x = rows.get();
      rotated.dtype = DType::f32;
      rotated.token_stride = block.dim;
      block.part.along_tokens ? quantize_along_tokens<bits(), float>(rotated)
                              : quantize_along_channels<bits(), float>(rotated);
    });
  });
}

void dequantize_block(const QuantBlock& block) {
  with_bits(block.part.bits, [&](auto bits) {
    with_dtype(block.dtype, [&](auto element) {
      using T = decltype(element);
      if (block.part.rotate == 0) return dequantize_rows<bits(), T>(block);
      QuantBlock rotated = block;
      const Floats rows = new_floats(block.tokens * block.dim);
      rotated.x = rows.get();
      rotated.token_stride = block.dim;
      dequantize_rows<bits(), float>(rotated);
      rotate_rows(block, true, [&](const HadamardRow& row, int64_t t, float scale, float* scratch) {
        float* from = rows.get() + t * block.dim;
        row.run(from, from, scale, scratch);
        T* to = static_cast<T*>(block.x) + t * block.token_stride;
        int d = 0;
        for (; d + W <= block.dim; d += W) store(saturated<T>(load(from + d)), to + d);
        const int rest = static_cast<int>(block.dim) - d;
        if (rest > 0) store_partial(saturated<T>(load_partial(from + d, rest)), to + d, rest);
      });
    });
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
