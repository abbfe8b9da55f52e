// Arithmetic instructions: approximate functions, 16-bit conversions, bit and byte tricks.
#pragma once

#include "kvk/device/lang.h"

namespace kvk::device::ptx {

// 2**x. Relative error up to 2**-22; results below 2**-126 are 0; ex2(-inf) = 0.
KVK_DEVICE float ex2(float x) {
#if KVK_EMULATOR
  return emu::flush_subnormal(std::exp2(x));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x). Absolute error up to 2**-22 between 0.5 and 2, relative 2**-22 elsewhere; lg2(0) = -inf.
KVK_DEVICE float lg2(float x) {
#if KVK_EMULATOR
  return std::log2(emu::flush_subnormal(x));
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, within 1 ulp; rcp(0) = inf.
KVK_DEVICE float rcp(float x) {
#if KVK_EMULATOR
  return emu::flush_subnormal(1.0f / emu::flush_subnormal(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / sqrt(x), relative error up to 2**-22.
KVK_DEVICE float rsqrt(float x) {
#if KVK_EMULATOR
  return 1.0f / std::sqrt(emu::flush_subnormal(x));
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x), relative error up to 2**-11: good enough for an activation, too coarse for a score that a soft cap of 30 or
// 50 then multiplies.
KVK_DEVICE float tanh_approx(float x) {
#if KVK_EMULATOR
  return std::tanh(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Two floats to two 16-bit floats, round half to even; `lo` lands in bits 0 to 15. NaN becomes 0x7fff.
KVK_DEVICE uint32_t cvt_bf16x2(float lo, float hi) {
#if KVK_EMULATOR
  return emu::bf16_bits(lo) | uint32_t(emu::bf16_bits(hi)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
#endif
}
KVK_DEVICE uint32_t cvt_f16x2(float lo, float hi) {
#if KVK_EMULATOR
  return emu::f16_bits(lo) | uint32_t(emu::f16_bits(hi)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
#endif
}
KVK_DEVICE uint16_t cvt_bf16(float x) {
#if KVK_EMULATOR
  return emu::bf16_bits(x);
#else
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#endif
}
KVK_DEVICE uint16_t cvt_f16(float x) {
#if KVK_EMULATOR
  return emu::f16_bits(x);
#else
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#endif
}
KVK_DEVICE float cvt_f32_from_f16(uint16_t bits) {
#if KVK_EMULATOR
  return emu::f16_value(bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
#endif
}

// Four bytes picked from the eight of (hi, lo) by the low three bits of the selector's nibbles (bit 3 of a nibble would
// copy the sign; the emulator refuses it).
KVK_DEVICE uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector KVK_LOC) {
#if KVK_EMULATOR
  return emu::prmt(lo, hi, selector, loc);
#else
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(lo), "r"(hi), "r"(selector));
  return y;
#endif
}

// Any bitwise function of three words: kTable is the function of (0xf0, 0xcc, 0xaa).
template <int kTable>
KVK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256);
#if KVK_EMULATOR
  return emu::lop3(a, b, c, kTable);
#else
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(y) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return y;
#endif
}

}  // namespace kvk::device::ptx
