// merge_states at one instruction-set level: out = sum of w_i out_i with w_i = exp(lse_i - lse), lse = log sum exp(lse_i)
// (FlashInfer's recursive attention, natural log). Bytes: every part once and the result; bound by memory.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// max and sum of exp(lse_i - max) over n parts, from which come the weights exp(lse_i - max) / sum: exact however far
// from 0 the lse are, where exp(lse_i - lse) would feel the rounding of lse. +inf counts as -inf (FlashAttention-2 writes
// it for an empty row). With a NaN among the lse both are NaN.
struct Normaliser {
  float max = -kInf, sum = 0.0f;

  Normaliser(const float* lse, int64_t stride, int64_t n) {
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
      const float x = lse[i * stride];
      nan |= x != x;
      if (x < kInf && x > max) max = x;
    }
    if (nan) max = std::numeric_limits<float>::quiet_NaN();
    if (max == -kInf) return;
    for (int64_t i = 0; i < n; ++i) {
      if (lse[i * stride] != kInf) sum += std::exp(lse[i * stride] - max);
    }
  }
  float weight(float lse) const { return std::exp(lse - max) / sum; }
};

// A part that saw no key has no weight, and its values are not read.
bool saw_keys(float lse) { return lse != kInf && lse != -kInf; }

// dst[0..n) += w * src[0..n)
template <class T>
void add_scaled(const T* src, float w, int64_t n, float* dst) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(load(dst + d) + load(src + d) * w, dst + d);
  if (d < n) {
    const int rest = static_cast<int>(n - d);
    store_partial(load_partial(dst + d, rest) + load_partial(src + d, rest) * w, dst + d, rest);
  }
}

template <class T>
float dot(const T* a, const float* b, int64_t n) {
  V acc = 0.0f;
  int64_t d = 0;
  for (; d + W <= n; d += W) acc += load(a + d) * load(b + d);
  if (d < n) acc += load_partial(a + d, static_cast<int>(n - d)) * load_partial(b + d, static_cast<int>(n - d));
  float sums[4];
  sum_lanes(acc, acc, acc, acc, sums);
  return sums[0];
}

template <class T>
void store_scaled(const float* src, float w, int64_t n, T* dst) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(load(src + d) * w, dst + d);
  if (d < n) store_partial(load_partial(src + d, static_cast<int>(n - d)) * w, dst + d, static_cast<int>(n - d));
}

// Parts lie far apart, often a power of two, and rows of all of them side by side would fight for the same cache sets: a
// few rows are merged at a time, part after part, each part's piece being fetched while the one before is added.
constexpr int64_t kMergeBytes = 16 * 1024;
constexpr int kMergeRows = 64;
constexpr float kUnread = -1.0f;  // in place of the weight of a part that saw no key

// The lse of n parts of kMergeRows rows to weights, a lane for each row; Normaliser says how. out_lse and max: of each row.
void weigh(float* lse, int64_t n, int count, float* max, float* out_lse) {
  for (int r = 0; r < count; r += W) {
    V most = -kInf, nan = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      V x = load(lse + i * kMergeRows + r);
      stdx::where(x == kInf, x) = V(-kInf);
      stdx::where(x != x, nan) = x;
      stdx::where(x > most, most) = x;
      store(x, lse + i * kMergeRows + r);
    }
    stdx::where(nan != nan, most) = nan;
    V base = most, sum = 0.0f;
    stdx::where(base == -kInf, base) = V(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const V x = load(lse + i * kMergeRows + r);
      V part = exp(x - base);
      sum += part;
      stdx::where(x == -kInf, part) = V(kUnread);
      store(part, lse + i * kMergeRows + r);
    }
    for (int64_t i = 0; i < n; ++i) {
      const V part = load(lse + i * kMergeRows + r);
      V weight = part / sum;
      stdx::where(part == kUnread, weight) = V(kUnread);
      store(weight, lse + i * kMergeRows + r);
    }
    store(most, max + r);
    store(sum, out_lse + r);
  }
  for (int r = 0; r < count; ++r) out_lse[r] = max[r] == -kInf ? -kInf : max[r] + std::log(out_lse[r]);
}

template <class T>
void merge_rows(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.parts.shape[0], heads = a.parts.shape[2], dim = a.parts.shape[3];
  const int64_t part_stride = a.parts.stride[0], lse_stride = a.parts_lse.stride[0];
  const int64_t row_bytes = dim * int64_t{sizeof(T)};
  const int64_t most = std::clamp<int64_t>(kMergeBytes / row_bytes, 1, kMergeRows);
  const auto offset = [&](int64_t row, const int64_t* stride) {
    return row / heads * stride[0] + row % heads * stride[1];
  };
  const auto part_of = [&](int64_t row) { return a.parts.ptr<const T>() + offset(row, a.parts.stride + 1); };
  const auto fetch = [&](const T* row) {
    for (int64_t at = 0; at < row_bytes; at += 64) prefetch_l2(reinterpret_cast<const char*>(row) + at);
  };
  alignas(64) float max[kMergeRows], out_lse[kMergeRows];
  std::vector<float> weights(static_cast<size_t>(n * kMergeRows), -kInf), acc(static_cast<size_t>(most * dim));
  for (int64_t first = begin; first < end; first += most) {
    const int count = static_cast<int>(std::min(most, end - first));
    for (int r = 0; r < count; ++r) {
      const float* lse = a.parts_lse.ptr<const float>() + offset(first + r, a.parts_lse.stride + 1);
      for (int64_t i = 0; i < n; ++i) weights[static_cast<size_t>(i * kMergeRows + r)] = lse[i * lse_stride];
    }
    weigh(weights.data(), n, count, max, out_lse);
    for (int r = 0; r < count; ++r) std::fill_n(acc.begin() + r * dim, dim, max[r] == max[r] ? 0.0f : max[r]);
    for (int64_t i = 0; i < n; ++i) {
      const float* weight = weights.data() + i * kMergeRows;
      for (int r = 0; r < count; ++r) {
        const T* part = part_of(first + r) + i * part_stride;
        if (i + 1 < n) {
          fetch(part + part_stride);
        } else if (first + most + r < end) {
          fetch(part_of(first + most + r));
        }
        if (weight[r] != kUnread) add_scaled(part, weight[r], dim, acc.data() + r * dim);
      }
    }
    for (int r = 0; r < count; ++r) {
      store_scaled(acc.data() + r * dim, 1.0f, dim, a.out.ptr<T>() + offset(first + r, a.out.stride));
      a.lse.ptr<float>()[offset(first + r, a.lse.stride)] = out_lse[r];
    }
  }
}

// grad_out_i = w_i g; grad_lse_i = w_i (<g, out_i - out> + g_lse).
template <class T>
void backward_rows(const MergeStatesBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t n = a.parts.shape[0], heads = a.parts.shape[2], dim = a.parts.shape[3];
  std::vector<float> grad(static_cast<size_t>(dim)), dots(static_cast<size_t>(n));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = row / heads, h = row % heads;
    const float* lse = a.parts_lse.ptr<const float>() + t * a.parts_lse.stride[1] + h * a.parts_lse.stride[2];
    const T* part = a.parts.ptr<const T>() + t * a.parts.stride[1] + h * a.parts.stride[2];
    const T* g = a.grad_out.ptr<const T>() + t * a.grad_out.stride[0] + h * a.grad_out.stride[1];
    const float g_lse = a.grad_lse.ptr<const float>()[t * a.grad_lse.stride[0] + h * a.grad_lse.stride[1]];
    const Normaliser normaliser(lse, a.parts_lse.stride[0], n);
    std::fill(grad.begin(), grad.end(), 0.0f);
    add_scaled(g, 1.0f, dim, grad.data());
    float mean = 0.0f;  // <g, out>
    for (int64_t i = 0; i < n; ++i) {
      const float x = lse[i * a.parts_lse.stride[0]];
      if (!saw_keys(x)) continue;
      dots[static_cast<size_t>(i)] = dot(part + i * a.parts.stride[0], grad.data(), dim);
      mean += normaliser.weight(x) * dots[static_cast<size_t>(i)];
    }
    for (int64_t i = 0; i < n; ++i) {
      const float x = lse[i * a.parts_lse.stride[0]];
      float* to_lse = a.grad_parts_lse.ptr<float>() + i * a.grad_parts_lse.stride[0] + t * a.grad_parts_lse.stride[1] +
                      h * a.grad_parts_lse.stride[2];
      T* to =
          a.grad_parts.ptr<T>() + i * a.grad_parts.stride[0] + t * a.grad_parts.stride[1] + h * a.grad_parts.stride[2];
      if (saw_keys(x)) {
        const float w = normaliser.weight(x);
        *to_lse = w * (dots[static_cast<size_t>(i)] - mean + g_lse);
        store_scaled(grad.data(), w, dim, to);
      } else {
        *to_lse = 0.0f;
        for (int64_t d = 0; d < dim; ++d) from_float(0.0f, to[d]);
      }
    }
  }
}

}  // namespace

void merge_states(const MergeStatesArgs& args, int64_t begin, int64_t end) {
  switch (args.parts.dtype) {
    case DType::bf16: return merge_rows<bf16>(args, begin, end);
    case DType::f16: return merge_rows<f16>(args, begin, end);
    default: return merge_rows<float>(args, begin, end);
  }
}

void merge_states_backward(const MergeStatesBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.parts.dtype) {
    case DType::bf16: return backward_rows<bf16>(args, begin, end);
    case DType::f16: return backward_rows<f16>(args, begin, end);
    default: return backward_rows<float>(args, begin, end);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
