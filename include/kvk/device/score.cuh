// Score: what happens to q.k before the softmax, in the order of docs/conventions.md. Scores enter as q.k and leave times
// log2(e), ready for ex2.
#pragma once

#include "kvk/device/types.h"

namespace kvk::device {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Which parts of the score a kernel is compiled with.
enum ScorePart : uint32_t { kSoftCap = 1, kAlibi = 2, kKeyBias = 4, kMaskBits = 8 };

// tanh(x) to about 1e-6: tanh.approx is too coarse for a score that the cap then multiplies.
KVK_DEVICE float tanh_score(float x) {
  const float a = fabsf(x);
  if (a < 0.25f) {  // the quotient below would cancel
    const float z = x * x;
    return x * (1.0f + z * (-1.0f / 3 + z * (2.0f / 15 + z * (-17.0f / 315 + z * (62.0f / 2835)))));
  }
  const float t = 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2e * a));
  return x < 0.0f ? -t : t;
}

template <uint32_t kParts>
struct Score {
  float scale;      // softmax scale, times log2(e) unless a soft cap follows
  float cap, rcap;  // cap * log2(e) and 1 / cap

  KVK_DEVICE explicit Score(float softmax_scale, float soft_cap = 0.0f)
      : scale(softmax_scale * (kParts & kSoftCap ? 1.0f : kLog2e)), cap(soft_cap * kLog2e),
        rcap(kParts & kSoftCap ? 1.0f / soft_cap : 0.0f) {}

  // slope: of this query head; distance: |query position - key position|; bias: of this key.
  KVK_DEVICE float operator()(float qk, float slope, float distance, float bias) const {
    float s = qk * scale;
    if constexpr (kParts & kSoftCap) s = cap * tanh_score(s * rcap);
    if constexpr (kParts & kAlibi) s -= slope * kLog2e * distance;
    if constexpr (kParts & kKeyBias) s += bias * kLog2e;
    return s;
  }
};

}  // namespace kvk::device
