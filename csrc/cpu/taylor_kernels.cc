// Based's second-order Taylor feature map and its gradient at one instruction-set level, row by row: bound by the bytes of
// the features. Row i of the triangle is one product of a vector with the row's tail, and so is its gradient.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>

#include "cpu/lightning_chunk.h"
#include "cpu/row_walk.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

constexpr int kMost = padded(static_cast<int>(kMaxTaylorDim));

struct TaylorFactors {
  float linear, product, square;

  explicit TaylorFactors(int d)
      : linear(static_cast<float>(1.0 / std::sqrt(std::sqrt(d)))), product(static_cast<float>(1.0 / std::sqrt(d))),
        square(static_cast<float>(1.0 / std::sqrt(2.0 * d))) {}
};

// to[0..n) = from[0..n) * factor
template <class T>
void scaled(const float* from, int n, float factor, T* to) {
  int c = 0;
  for (; c + W <= n; c += W) store(load(from + c) * factor, to + c);
  if (c < n) store_partial(load(from + c) * factor, to + c, n - c);
}

template <class T>
void features(const float* x, int d, const TaylorFactors& factors, T* out) {
  from_float(1.0f, out[0]);
  scaled(x, d, factors.linear, out + 1);
  T* to = out + 1 + d;
  for (int i = 0; i < d; to += d - i, ++i) {
    from_float(x[i] * x[i] * factors.square, to[0]);
    scaled(x + i + 1, d - i - 1, x[i] * factors.product, to + 1);
  }
}

// grad_x[i] = linear * g_i + 2 * square * x_i g_ii + product * sum over the others j of x_j g_ij
template <class T>
void gradient(const T* grad, const float* x, int d, const TaylorFactors& factors, float* grad_x) {
  alignas(64) float row[kMost + W];
  load_row(grad + 1, d, grad_x);
  scale_row(grad_x, d, factors.linear);
  const T* from = grad + 1 + d;
  for (int i = 0; i < d; from += d - i, ++i) {
    const int n = d - i - 1;
    load_row(from + 1, n, row);
    const V own = x[i] * factors.product;
    V sum = 0.0f;
    for (int c = 0; c < n; c += W) {
      const V g = load(row + c);  // 0 past the row
      sum += g * load(x + i + 1 + c);
      store(load(grad_x + i + 1 + c) + g * own, grad_x + i + 1 + c);
    }
    float sums[4];
    sum_lanes(sum, sum, sum, sum, sums);
    grad_x[i] += factors.product * sums[0] + 2.0f * factors.square * x[i] * to_float(from[0]);
  }
}

}  // namespace

void taylor_feature_map(const TaylorFeatureMapArgs& args, int64_t begin, int64_t end) {
  const int d = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const TaylorFactors factors(d);
  by_dtype(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float x[kMost + W] = {};
    RowWalk from(args.x, begin), to(args.out, begin);
    for (int64_t r = begin; r < end; ++r, from.next(), to.next()) {
      load_row(args.x.ptr<const T>() + from.offset(), d, x);
      features(x, d, factors, args.out.ptr<T>() + to.offset());
    }
  });
}

void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, int64_t begin, int64_t end) {
  const int d = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const TaylorFactors factors(d);
  by_dtype(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float x[kMost + W] = {}, grad_x[kMost + W] = {};
    RowWalk from(args.x, begin), grad(args.grad, begin), to(args.grad_x, begin);
    for (int64_t r = begin; r < end; ++r, from.next(), grad.next(), to.next()) {
      load_row(args.x.ptr<const T>() + from.offset(), d, x);
      gradient(args.grad.ptr<const T>() + grad.offset(), x, d, factors, grad_x);
      store_row(grad_x, d, args.grad_x.ptr<T>() + to.offset());
    }
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
