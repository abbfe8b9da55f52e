// Codes of 2, 3, 4 and 8 bits: 8 of them, as many bytes as a code has bits.
#pragma once

#include "kvk/device/types.h"

namespace kvk::device {

// 8 codes, low bits first: one word, or two at 8 bits.
template <int kBits>
struct PackedCodes {
  static constexpr int kWords = kBits == 8 ? 2 : 1;
  uint32_t w[kWords] = {};

  KVK_DEVICE uint32_t code(int i) const {
    const int bit = i * kBits;
    return w[bit / 32] >> (bit % 32) & ((1u << kBits) - 1);
  }
  KVK_DEVICE void put(int i, uint32_t code) {
    const int bit = i * kBits;
    w[bit / 32] |= code << (bit % 32);
  }
  // 256 + code: a code becomes a float by an or into the mantissa of one. Folded into what follows, the 256 costs nothing.
  KVK_DEVICE float plus_256(int i) const {
    const int shift = 15 - i * kBits % 32;
    const uint32_t word = w[i * kBits / 32];
    const uint32_t moved = shift >= 0 ? word << shift : word >> -shift;
    return __uint_as_float((moved & ((1u << kBits) - 1) << 15) | 0x43800000u);
  }
};

// p lies on a multiple of kBits bytes (of 1 at 3 bits).
template <int kBits>
KVK_DEVICE PackedCodes<kBits> load_codes(const uint8_t* p) {
  PackedCodes<kBits> codes;
  if constexpr (kBits == 8) {
    const Words<2> words = load_words<2>(p);
    codes.w[0] = words.w[0];
    codes.w[1] = words.w[1];
  } else if constexpr (kBits == 4) {
    codes.w[0] = load_words<1>(p).w[0];
  } else if constexpr (kBits == 3) {
    codes.w[0] = p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16;
  } else {
    codes.w[0] = *reinterpret_cast<const uint16_t*>(p);
  }
  return codes;
}

template <int kBits>
KVK_DEVICE void store_codes(uint8_t* p, const PackedCodes<kBits>& codes) {
  if constexpr (kBits == 8) {
    store_words<2>(p, {{codes.w[0], codes.w[1]}});
  } else if constexpr (kBits == 4) {
    store_words<1>(p, {{codes.w[0]}});
  } else if constexpr (kBits == 3) {
    p[0] = static_cast<uint8_t>(codes.w[0]);
    p[1] = static_cast<uint8_t>(codes.w[0] >> 8);
    p[2] = static_cast<uint8_t>(codes.w[0] >> 16);
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(codes.w[0]);
  }
}

inline constexpr float kF16Max = 65504.0f;

// f16 saturates, and only f16.
template <class T>
KVK_DEVICE float saturated(float x) {
  if constexpr (kSameType<T, f16>) {
    if (x > kF16Max) return kF16Max;
    if (x < -kF16Max) return -kF16Max;
  }
  return x;
}

}  // namespace kvk::device
