// Codes from numbers and back, with the arithmetic of docs/formats.md: the CPU's bits. Each step is one rounded float
// operation; the intrinsics keep the compiler from fusing two.
//
// Bytes: every element once (twice with groups along tokens, the second time from L1), its codes and 4 bytes a group once.
// About 15 operations an element, 8 of them to encode: at 4 bits some 70% of what an H100 issues in the time of its memory, so
// bound by memory, if barely.
// Tile: a warp takes whole groups, 8 channels a lane. Groups along tokens: as many rows side by side as fit 32 lanes, 4 at head
// dim 64, all of a group's tokens, two passes. Groups along channels: one pass, in registers.
// Rotated rows are transformed by the lanes that hold them, on the way in or out.
#pragma once

#include "kvk/device/hadamard.cuh"
#include "kvk/device/quant_codes.cuh"
#include "kvk/device/quant_params.h"

namespace kvk::device {

// What a group of elements is stored with, and what its codes are made with.
struct QuantGroup {
  uint16_t scale_bits, min_bits;  // f16, as stored
  float min, top;                 // top = scale * (2**bits - 1): elements beyond min + top saturate
  float divisor, reciprocal;      // the stored scale, 1 where it is 0; and 1 / divisor

  // low, high: smallest and largest element; bad: there is a NaN or an infinity among them.
  template <int kBits>
  KVK_DEVICE static QuantGroup of(float low, float high, bool bad, float clip) {
    if (low != high) {
      low = __fmul_rn(low, clip);
      high = __fmul_rn(high, clip);
    }
    constexpr float kLevels = (1 << kBits) - 1;
    QuantGroup g;
    g.min_bits = ptx::cvt_f16(__fadd_rn(fminf(fmaxf(low, -kF16Max), kF16Max), 0.0f));  // + 0: -0 becomes 0
    g.min = ptx::cvt_f32_from_f16(g.min_bits);
    const float step = __fdiv_rn(__fsub_rn(high, g.min), kLevels);
    g.scale_bits = ptx::cvt_f16(__fadd_rn(fminf(fmaxf(step, 0.0f), kF16Max), 0.0f));
    if (bad) {
      g.min_bits = 0x7e00;
      g.min = kNaN;
      g.scale_bits = 0;
    }
    const float scale = ptx::cvt_f32_from_f16(g.scale_bits);
    g.top = __fmul_rn(scale, kLevels);
    g.divisor = scale == 0.0f ? 1.0f : scale;
    g.reciprocal = __fdiv_rn(1.0f, g.divisor);
    return g;
  }

  // round_half_even((x - min) / scale), saturated: 0 where x - min is NaN. The quotient is that of a division: with the
  // reciprocal rounded right, one step of correction rounds it right (Markstein 1990), but for quotients far below 1/2.
  KVK_DEVICE uint32_t encode(float x) const {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: the sum's low bits are the rounded quotient
    const float t = fminf(fmaxf(__fsub_rn(x, min), 0.0f), top);
    const float q = __fmul_rn(t, reciprocal);
    const float exact = __fmaf_rn(__fmaf_rn(-q, divisor, t), reciprocal, q);
    return __float_as_uint(__fadd_rn(exact, kRound)) & 0xffu;
  }
};

// Smallest and largest of the elements seen, and whether one is NaN or infinite.
struct Extremes {
  float low = kInfinity, high = -kInfinity;
  bool bad = false;

  KVK_DEVICE void see(float x) {
    low = fminf(low, x);
    high = fmaxf(high, x);
    bad |= !(fabsf(x) < kInfinity);
  }
  KVK_DEVICE void join(float other_low, float other_high) {
    low = fminf(low, other_low);
    high = fmaxf(high, other_high);
  }
};

// One matrix [tokens, dim] of a call: where its numbers and its codes are.
template <class Config>
class QuantMatrix {
 public:
  using T = typename Config::T;

  KVK_DEVICE QuantMatrix(const QuantParams& p, int64_t index) : p_(p) {
    const RecordMatrix m(p, index);
    inside_ = m.inside();
    x_ = static_cast<T*>(p.x) + m.x_offset;
    codes_ = m.packed(p.codes);
    scale_ = reinterpret_cast<uint16_t*>(m.packed(p.scale));
    min_ = reinterpret_cast<uint16_t*>(m.packed(p.min));
  }

  // False: nothing is read or written.
  KVK_DEVICE bool inside() const { return inside_; }
  KVK_DEVICE T* x(int64_t token, int64_t channel) const { return x_ + token * p_.token_stride + channel; }
  KVK_DEVICE uint8_t* codes(int64_t token, int64_t channel) const {
    return codes_ + (token * p_.dim + channel) / 8 * Config::kBits;
  }
  KVK_DEVICE uint16_t* scale(int64_t index) const { return scale_ + index; }
  KVK_DEVICE uint16_t* min(int64_t index) const { return min_ + index; }

  KVK_DEVICE void clear_padding(int lane) const {
    KVK_UNROLL
    for (int part = 0; part < 3; ++part) {
      const int64_t byte = p_.padding[part][0] + lane;
      if (byte < p_.padding[part][1]) codes_[byte] = 0;
    }
  }

 private:
  const QuantParams& p_;
  bool inside_;
  T* x_;
  uint8_t* codes_;
  uint16_t* scale_;
  uint16_t* min_;
};

template <class Config>
class QuantizeWarp {
 public:
  static constexpr int kBits = Config::kBits;

  KVK_DEVICE QuantizeWarp(const QuantParams& p, int64_t matrix, float* scratch)
      : p_(p), m_(p, matrix), scratch_(scratch), lane_(threadIdx.x % 32) {}

  KVK_DEVICE void run(int64_t work) const {
    if (!m_.inside()) return;
    if constexpr (Config::kAlongTokens) {
      along_tokens(work);
    } else {
      along_channels(work);
    }
    if (work == 0) m_.clear_padding(lane_);
  }

 private:
  // 8 elements, rotated where the record is. All lanes of the warp.
  KVK_DEVICE void load(bool valid, int64_t token, int64_t channel, float (&x)[8]) const {
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    if (valid) load_elements(m_.x(token, channel), p_.vectors, x);
    if constexpr (Config::kRotated > 0)
      WarpRows<Config::kRotated>::template rotate<false>(x, p_.rotate_scale, scratch_);
  }

  // All tokens of a group for up to 256 channels.
  KVK_DEVICE void along_tokens(int64_t work) const {
    const QuantLanes lanes = QuantLanes::of_rows(p_.dim);
    const int64_t run = work / lanes.columns,
                  channel = work % lanes.columns * lanes.lanes * 8 + lane_ % lanes.lanes * 8;
    const int row = lane_ / lanes.lanes;
    const bool inside = row < lanes.rows && channel < p_.dim;
    Extremes seen[8];
    float x[8];
    for (int first = 0; first < p_.group; first += lanes.rows) {
      const bool valid = inside && first + row < p_.group;
      load(valid, run * p_.group + first + row, channel, x);
      if (!valid) continue;
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) seen[i].see(x[i]);
    }
    uint32_t bad = 0;  // a bit for each channel
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) bad |= uint32_t{seen[i].bad} << i;
    join_rows(seen, bad, lanes);
    QuantGroup groups[8];
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) {
      groups[i] = QuantGroup::of<kBits>(seen[i].low, seen[i].high, bad >> i & 1, p_.clip);
    }
    if (inside && row == 0) {
      Words<4> scale, min;
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        scale.w[i] = groups[2 * i].scale_bits | uint32_t{groups[2 * i + 1].scale_bits} << 16;
        min.w[i] = groups[2 * i].min_bits | uint32_t{groups[2 * i + 1].min_bits} << 16;
      }
      store_words(m_.scale(run * p_.dim + channel), scale);
      store_words(m_.min(run * p_.dim + channel), min);
    }
    for (int first = 0; first < p_.group; first += lanes.rows) {
      const bool valid = inside && first + row < p_.group;
      const int64_t token = run * p_.group + first + row;
      load(valid, token, channel, x);
      if (!valid) continue;
      PackedCodes<kBits> codes;
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) codes.put(i, groups[i].encode(x[i]));
      store_codes(m_.codes(token, channel), codes);
    }
  }

  // Every row's lanes get what all of them saw.
  KVK_DEVICE void join_rows(Extremes (&seen)[8], uint32_t& bad, const QuantLanes& lanes) const {
    Extremes mine[8];
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) mine[i] = seen[i];
    const uint32_t my_bad = bad;
    for (int row = 0; row < lanes.rows; ++row) {
      const int from = row * lanes.lanes + lane_ % lanes.lanes;
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float low = __shfl_sync(0xffffffffu, mine[i].low, from);
        const float high = __shfl_sync(0xffffffffu, mine[i].high, from);
        seen[i].join(low, high);
      }
      bad |= __shfl_sync(0xffffffffu, my_bad, from);
    }
  }

  // Several groups, each in a run of lanes.
  KVK_DEVICE void along_channels(int64_t work) const {
    const QuantLanes lanes = QuantLanes::of_groups(p_.dim, p_.group, Config::kRotated > 0);
    const int64_t groups = p_.dim / p_.group, group = work * lanes.rows + lane_ / lanes.lanes;
    const int first_lane = lane_ / lanes.lanes * lanes.lanes;
    const int64_t token = group / groups, channel = group % groups * p_.group + (lane_ - first_lane) * 8;
    const bool valid = lane_ < lanes.rows * lanes.lanes && token < p_.tokens;
    float x[8];
    load(valid, token, channel, x);
    Extremes mine;
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) mine.see(x[i]);
    const uint32_t bad = __ballot_sync(0xffffffffu, mine.bad);
    Extremes seen;
    for (int i = 0; i < lanes.lanes; ++i) {
      const int from = first_lane + i < 32 ? first_lane + i : 31;
      const float low = __shfl_sync(0xffffffffu, mine.low, from);
      const float high = __shfl_sync(0xffffffffu, mine.high, from);
      seen.join(low, high);
    }
    if (!valid) return;
    const uint32_t of_group = ((1u << lanes.lanes) - 1) << first_lane;
    const QuantGroup g = QuantGroup::of<kBits>(seen.low, seen.high, (bad & of_group) != 0, p_.clip);
    if (lane_ == first_lane) {
      *m_.scale(group) = g.scale_bits;
      *m_.min(group) = g.min_bits;
    }
    PackedCodes<kBits> codes;
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) codes.put(i, g.encode(x[i]));
    store_codes(m_.codes(token, channel), codes);
  }

  const QuantParams& p_;
  QuantMatrix<Config> m_;
  float* scratch_;
  int lane_;
};

template <class Config>
KVK_KERNEL(128, 1)
quantize_kernel(const __grid_constant__ QuantParams p) {
  float* scratch = rotation_scratch<Config::kRotated>();
  const QuantPart part = {Config::kBits, p.group, Config::kAlongTokens, Config::kRotated > 0};
  const int64_t warps = quantize_warps(p.tokens, p.dim, part), total = warps * p.num_matrices;
  for (int64_t i = int64_t{blockIdx.x} * 4 + threadIdx.x / 32; i < total; i += int64_t{gridDim.x} * 4) {
    QuantizeWarp<Config>(p, i / warps, scratch).run(i % warps);
  }
}

// Rows of a matrix, as many side by side as fit a warp.
template <class Config>
KVK_DEVICE void dequantize_rows(const QuantParams& p, int64_t matrix, int64_t work, float* scratch) {
  using T = typename Config::T;
  const QuantMatrix<Config> m(p, matrix);
  if (!m.inside()) return;
  const int lane = threadIdx.x % 32;
  const QuantLanes lanes = QuantLanes::of_rows(p.dim);
  const int64_t token = work / lanes.columns * lanes.rows + lane / lanes.lanes;
  const int64_t channel = work % lanes.columns * lanes.lanes * 8 + lane % lanes.lanes * 8;
  const bool valid = lane < lanes.rows * lanes.lanes && token < p.tokens && channel < p.dim;
  float x[8] = {};
  if (valid) {
    const PackedCodes<Config::kBits> codes = load_codes<Config::kBits>(m.codes(token, channel));
    float scale[8], min[8];
    if constexpr (Config::kAlongTokens) {
      const int64_t at = token / p.group * p.dim + channel;
      load_elements(reinterpret_cast<const f16*>(m.scale(at)), true, scale);
      load_elements(reinterpret_cast<const f16*>(m.min(at)), true, min);
    } else {
      const int64_t at = token * (p.dim / p.group) + channel / p.group;
      const float one_scale = ptx::cvt_f32_from_f16(*m.scale(at)), one_min = ptx::cvt_f32_from_f16(*m.min(at));
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) {
        scale[i] = one_scale;
        min[i] = one_min;
      }
    }
    KVK_UNROLL  // the product is exact, so fused or not is the same
        for (int i = 0; i < 8; ++i) x[i] = __fmaf_rn(static_cast<float>(codes.code(i)), scale[i], min[i]);
  }
  if constexpr (Config::kRotated > 0) WarpRows<Config::kRotated>::template rotate<true>(x, p.rotate_scale, scratch);
  if (!valid) return;
  KVK_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = saturated<T>(x[i]);
  store_elements(m.x(token, channel), p.vectors, x);
}

template <class Config>
KVK_KERNEL(128, 1)
dequantize_kernel(const __grid_constant__ QuantParams p) {
  float* scratch = rotation_scratch<Config::kRotated>();
  const int64_t warps = dequantize_warps(p.tokens, p.dim), total = warps * p.num_matrices;
  for (int64_t i = int64_t{blockIdx.x} * 4 + threadIdx.x / 32; i < total; i += int64_t{gridDim.x} * 4) {
    dequantize_rows<Config>(p, i / warps, i % warps, scratch);
  }
}

}  // namespace kvk::device
