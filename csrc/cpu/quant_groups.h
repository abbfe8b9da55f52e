// Groups on their way into codes: what is stored of each, and the codes of its elements.
#pragma once

#include <algorithm>

#include "cpu/simd_codes.h"

namespace kvk::cpu::KVK_LEVEL {

inline constexpr int kBatch = 128;  // groups, or columns, whose scales are worked out together
inline constexpr float kF16Max = 65504.0f;

// One entry for each group of a batch. The arrays hold whole vectors.
struct Groups {
  alignas(64) float low[kBatch], high[kBatch];
  alignas(64) float bad[kBatch];      // NaN where the group holds a NaN or an infinity
  alignas(64) float min[kBatch];      // as stored
  alignas(64) float top[kBatch];      // scale * (2**bits - 1): elements beyond min + top saturate
  alignas(64) float divisor[kBatch];  // the stored scale; 1 where it is 0
  alignas(64) float inverse[kBatch];  // 1 / scale; 0 where it is 0

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
      V reciprocal = 1.0f / divide_by;
      stdx::where(step == 0.0f, reciprocal) = V(0.0f);
      store(reciprocal, inverse + i);
    }
  }
};

// round_half_even((x - min) / scale), saturated: 0 where x - min is NaN.
inline void encode(V x, V min, V top, V divisor, uint8_t* to) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: the sum's low bits are the rounded quotient
  const V t = smaller(larger(x - min, V(0.0f)), top);
  store_bytes(bit_cast<VU32>(V(t / divisor + kRound)) & 0xffu, to);
}

// The same codes without the division, for kVecs vectors: (x - min) * inverse is within 2**-14 of the quotient, so only where
// it lies that near to halfway between two codes could they differ. Returns whether some element does: then encode() decides.
template <int kVecs, class T, class Column>
inline bool encode_fast(const T* x, Column&& column, float levels, uint8_t* to) {
  V far = 0.0f;
  VU32 codes[kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    V min, inverse;
    column(i * W, min, inverse);
    const V quotient = smaller(larger((load(x + i * W) - min) * inverse, V(0.0f)), V(levels));  // NaN: 0
    V whole;
    codes[i] = round_codes(quotient, whole);
    const V distance = quotient - whole;
    far = larger(distance, larger(-distance, far));
  }
  store_bytes<kVecs>(codes, to);
  return stdx::any_of(far > 0.5f - 0x1p-12f);
}

}  // namespace kvk::cpu::KVK_LEVEL
