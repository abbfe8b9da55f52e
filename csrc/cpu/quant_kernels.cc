// Quantizing and dequantizing of blocks at one instruction-set level. Codes, scales and minima are the same bits at every
// level: each step is one IEEE operation in float32 (docs/formats.md), and no product is fused into a sum.
//
// Bytes: every element once, its codes once, 4 bytes a group. Two passes over the elements of a group, the second in cache:
// about 20 operations and one division a vector; bound by them rather than by memory.
#include "cpu/kernels.h"

#include <memory>
#include <new>
#include <vector>

#include "cpu/hadamard_rows.h"
#include "cpu/simd_codes.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

constexpr int kBatch = 128;  // groups, or columns, whose scales are worked out together
constexpr float kF16Max = 65504.0f;

// One entry for each group of a batch. The arrays hold whole vectors.
struct Groups {
  alignas(64) float low[kBatch], high[kBatch];
  alignas(64) float bad[kBatch];      // NaN where the group holds a NaN or an infinity
  alignas(64) float min[kBatch];      // as stored
  alignas(64) float top[kBatch];      // scale * (2**bits - 1): elements beyond min + top saturate
  alignas(64) float divisor[kBatch];  // the stored scale; 1 where it is 0

  // From low, high and bad: what is stored, and what codes are made with.
  void finish(int count, float clip, int bits, f16* scale_out, f16* min_out) {
    if (clip != 1.0f) {
      for (int i = 0; i < count; ++i) {
        if (low[i] == high[i]) continue;
        low[i] *= clip;
        high[i] *= clip;
      }
      // The products are rounded by themselves: the compiler may not fuse them into the difference below.
      asm volatile("" : : "r"(low), "r"(high) : "memory");
    }
    const auto levels = static_cast<float>((1 << bits) - 1);
    alignas(64) f16 half[W];
    for (int i = 0; i < count; i += W) {
      const int n = std::min(W, count - i);
      const auto round_to_f16 = [&](V x, f16* out) {
        store(x, half);
        std::memcpy(out, half, static_cast<size_t>(n) * sizeof(f16));
        return load(half);
      };
      const V sick = load(bad + i);
      const auto is_bad = sick != sick;
      V smallest = smaller(larger(load(low + i), V(-kF16Max)), V(kF16Max)) + 0.0f;  // + 0: -0 becomes 0
      stdx::where(is_bad, smallest) = V(std::numeric_limits<float>::quiet_NaN());
      smallest = round_to_f16(smallest, min_out + i);
      V step = (load(high + i) - smallest) / levels;
      step = round_to_f16(smaller(larger(step, V(0.0f)), V(kF16Max)), scale_out + i);
      V divide_by = step;
      stdx::where(step == 0.0f, divide_by) = V(1.0f);
      store(smallest, min + i);
      store(step * levels, top + i);
      store(divide_by, divisor + i);
    }
  }
};

// round_half_even((x - min) / scale), saturated: 0 where x - min is NaN.
inline void encode(V x, V min, V top, V divisor, uint8_t* to) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: the sum's low bits are the rounded quotient
  const V t = smaller(larger(x - min, V(0.0f)), top);
  store_bytes(bit_cast<VU32>(V(t / divisor + kRound)) & 0xffu, to);
}

// Smallest and largest elements and NaN-ness over what was seen.
struct Extremes {
  V low = kInf, high = -kInf, bad = 0.0f;
  void see(V x) {
    low = smaller(x, low);
    high = larger(x, high);
    bad += x * 0.0f;
  }
};

// W elements of a row of `left` remaining, zeros behind its end.
template <class T>
inline V load_columns(const T* p, int64_t left) {
  return left >= W ? load(p) : load_partial(p, static_cast<int>(left));
}

// Extremes of kVecs vectors of columns over `tokens` rows.
template <int kVecs, class T>
inline void column_extremes(const T* x, int64_t stride, int tokens, int64_t left, Groups& groups, int at) {
  Extremes e[kVecs];
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i)
      e[i].see(kVecs > 1 ? load(x + t * stride + i * W) : load_columns(x + t * stride, left));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) {
    store(e[i].low, groups.low + at + i * W);
    store(e[i].high, groups.high + at + i * W);
    store(e[i].bad, groups.bad + at + i * W);
  }
}

template <int kBits, class T>
void quantize_along_tokens(const QuantBlock& b) {
  const T* x = static_cast<const T*>(b.x);
  const int64_t row_bytes = b.dim * kBits / 8;
  constexpr int kVecs = kManyRegisters ? 8 : 4;
  Groups groups;
  alignas(64) uint8_t codes[kBatch];
  for (int64_t first = 0; first < b.tokens; first += b.part.group) {
    for (int64_t c = 0; c < b.dim; c += kBatch) {
      const int n = static_cast<int>(std::min<int64_t>(kBatch, b.dim - c));
      const T* block = x + first * b.token_stride + c;
      int d = 0;
      for (; d + kVecs * W <= n; d += kVecs * W) {
        column_extremes<kVecs>(block + d, b.token_stride, b.part.group, n - d, groups, d);
      }
      for (; d < n; d += W) column_extremes<1>(block + d, b.token_stride, b.part.group, n - d, groups, d);
      const int64_t scales = first / b.part.group * b.dim + c;
      groups.finish(n, b.clip, kBits, b.scale + scales, b.min + scales);
      for (int t = 0; t < b.part.group; ++t) {
        const T* row = block + t * b.token_stride;
        for (d = 0; d < n; d += W) {
          encode(load_columns(row + d, n - d), load(groups.min + d), load(groups.top + d), load(groups.divisor + d),
                 codes + d);
        }
        pack_codes<kBits>(codes, n, b.codes + (first + t) * row_bytes + c * kBits / 8);
      }
    }
  }
}

template <int kBits, class T>
void quantize_along_channels(const QuantBlock& b) {
  const int group = b.part.group;
  const int64_t per_row = b.dim / group, total = b.tokens * per_row;
  const T* x = static_cast<const T*>(b.x);
  Groups groups;
  alignas(64) uint8_t codes[kBatch];
  // Vectors of a group; the last one ends with the group (16 elements or more), so that two may overlap.
  const auto each_vector = [group](auto&& f) {
    for (int d = 0; d < group; d += W) f(std::min(d, group - W));
  };
  for (int64_t first = 0; first < total; first += kBatch) {
    const int n = static_cast<int>(std::min<int64_t>(kBatch, total - first));
    const auto elements = [&](int i) {
      return x + (first + i) / per_row * b.token_stride + (first + i) % per_row * group;
    };
    for (int i = 0; i < n; ++i) {
      const T* p = elements(i);
      Extremes e;
      each_vector([&](int d) { e.see(load(p + d)); });
      groups.low[i] = stdx::hmin(e.low);
      groups.high[i] = stdx::hmax(e.high);
      groups.bad[i] = stdx::reduce(e.bad);
    }
    groups.finish(n, b.clip, kBits, b.scale + first, b.min + first);
    for (int i = 0; i < n; ++i) {
      const T* p = elements(i);
      const V min = groups.min[i], top = groups.top[i], divisor = groups.divisor[i];
      each_vector([&](int d) { encode(load(p + d), min, top, divisor, codes + d); });
      pack_codes<kBits>(codes, group, b.codes + (first + i) * group * kBits / 8);
    }
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

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
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
