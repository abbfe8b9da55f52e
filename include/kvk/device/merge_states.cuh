// merge_states and its gradient: out = sum of w_i out_i with w_i = exp(lse_i - max) / sum. Bytes: every part once (twice in
// the gradient) and the result; bound by memory. Tile: one warp a (token, head), lanes along the head dim.
#pragma once

#include "kvk/device/merge_states_params.h"
#include "kvk/device/types.h"

namespace kvk::device {

// Where (part, token, head) lies.
template <class T>
KVK_DEVICE T* at(const PartsView& view, int64_t part, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + part * view.part_stride + token * view.token_stride + head * view.head_stride;
}

// A part that saw no key, which is not read. FlashAttention-2 writes +inf for one.
KVK_DEVICE bool saw_keys(float lse) { return lse != kInfinity && lse != -kInfinity; }

// max and sum of exp(lse_i - max); both NaN with a NaN among the lse. The same in every lane.
struct Normaliser {
  float max = -kInfinity, sum = 0.0f;

  KVK_DEVICE Normaliser(const PartsView& lse, int64_t num_parts, int64_t token, int64_t head) {
    bool nan = false;
    for (int64_t i = 0; i < num_parts; ++i) {
      const float x = *at<const float>(lse, i, token, head);
      nan |= is_nan(x);
      if (saw_keys(x)) max = fmaxf(max, x);
    }
    if (nan) max = kNaN;
    if (max == -kInfinity) return;
    for (int64_t i = 0; i < num_parts; ++i) {
      const float x = *at<const float>(lse, i, token, head);
      if (saw_keys(x)) sum += expf(x - max);
    }
  }
  KVK_DEVICE float weight(float lse) const { return expf(lse - max) / sum; }
  KVK_DEVICE float merged() const { return max == -kInfinity ? -kInfinity : max + logf(sum); }
};

template <class T>
KVK_KERNEL(128, 1)
merge_states_kernel(const __grid_constant__ MergeStatesParams p) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int64_t token = row / p.num_heads, head = row % p.num_heads;
  if (token >= p.num_tokens) return;
  const Normaliser normaliser(p.parts_lse, p.num_parts, token, head);
  for (int64_t d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    float acc = is_nan(normaliser.max) ? kNaN : 0.0f;
    for (int64_t i = 0; i < p.num_parts; ++i) {
      const float lse = *at<const float>(p.parts_lse, i, token, head);
      if (saw_keys(lse)) acc += normaliser.weight(lse) * to_float(at<const T>(p.parts, i, token, head)[d]);
    }
    at<T>(p.out, 0, token, head)[d] = from_float<T>(acc);
  }
  if (threadIdx.x % 32 == 0) *at<float>(p.lse, 0, token, head) = normaliser.merged();
}

// grad_out_i = w_i g; grad_lse_i = w_i (<g, out_i> - <g, out> + g_lse).
template <class T>
KVK_KERNEL(128, 1)
merge_states_backward_kernel(const __grid_constant__ MergeStatesBackwardParams p) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int64_t token = row / p.num_heads, head = row % p.num_heads;
  if (token >= p.num_tokens) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const Normaliser normaliser(p.parts_lse, p.num_parts, token, head);
  const T* grad = at<const T>(p.grad_out, 0, token, head);
  const float grad_lse = *at<const float>(p.grad_lse, 0, token, head);
  const auto dot = [&](int64_t part) {
    float sum = 0.0f;
    for (int64_t d = lane; d < p.head_dim; d += 32) {
      sum += to_float(grad[d]) * to_float(at<const T>(p.parts, part, token, head)[d]);
    }
    return warp_sum(sum);
  };
  float mean = 0.0f;  // <g, out>
  for (int64_t i = 0; i < p.num_parts; ++i) {
    const float lse = *at<const float>(p.parts_lse, i, token, head);
    if (saw_keys(lse)) mean += normaliser.weight(lse) * dot(i);
  }
  for (int64_t i = 0; i < p.num_parts; ++i) {
    const float lse = *at<const float>(p.parts_lse, i, token, head);
    const bool seen = saw_keys(lse);
    const float weight = seen ? normaliser.weight(lse) : 0.0f;
    const float own = seen ? dot(i) : 0.0f;  // computed again: the parts may be many
    if (lane == 0) *at<float>(p.grad_parts_lse, i, token, head) = seen ? weight * (own - mean + grad_lse) : 0.0f;
    for (int64_t d = lane; d < p.head_dim; d += 32) {
      at<T>(p.grad_parts, i, token, head)[d] = from_float<T>(seen ? weight * to_float(grad[d]) : 0.0f);
    }
  }
}

}  // namespace kvk::device
