// 16-bit floats of the emulator, bit for bit as the GPU converts them (round half to even, NaN becomes 0x7fff).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace kvk::emu {

inline uint16_t bf16_bits(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t f16_bits(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {                                 // subnormal: in steps of 2**-24
    return uint16_t(sign | uint32_t(std::lrintf(std::bit_cast<float>(magnitude) * 0x1p24f)));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

inline float f16_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31;
  const uint32_t mantissa = bits & 1023;
  if (exponent == 0) {
    const float x = float(mantissa) * 0x1p-24f;
    return sign ? -x : x;
  }
  const uint32_t wide =
      exponent == 31 ? (mantissa ? 0x7fffe000u : 0x7f800000u) : (exponent + 112) << 23 | mantissa << 13;
  return std::bit_cast<float>(sign | wide);
}

inline float value_of(uint16_t bits, bool is_bf16) { return is_bf16 ? bf16_value(bits) : f16_value(bits); }

}  // namespace kvk::emu
