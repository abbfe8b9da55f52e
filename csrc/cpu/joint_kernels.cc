// Dense rows of several kv heads into the fp32 rows that are quantized head by head, and back; at one instruction-set level.
//
// Bytes: every element once each way; 2 log2(m * D) operations an element. A row stays in the first cache.
#include "cpu/joint_rows.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

constexpr float kF16Max = 65504.0f;

template <class T>
inline V saturated(V x) {
  if constexpr (std::is_same_v<T, f16>) {
    stdx::where(x > kF16Max, x) = V(kF16Max);
    stdx::where(x < -kF16Max, x) = V(-kF16Max);
  }
  return x;
}

// The row of one head of one token.
template <class T>
T* head_row(const JointBlock& b, int64_t token, int64_t head) {
  return static_cast<T*>(b.x) + token * b.token_stride + head * b.head_stride;
}

}  // namespace

void join_rows(const JointBlock& b) {
  const int n = static_cast<int>(b.heads * b.dim);
  JointRow joint(n, b.rotated, b.permutation, b.group);
  with_dtype(b.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t t = 0; t < b.tokens; ++t) {
      float* row = b.rows + t * n;
      for (int64_t h = 0; h < b.heads; ++h) {
        const T* from = head_row<const T>(b, t, h);
        for (int64_t d = 0; d < b.dim; d += 8) {
          if constexpr (W > 8) {
            store_partial(load_partial(from + d, 8), row + h * b.dim + d, 8);
          } else {
            for (int64_t e = d; e < d + 8; e += W) store(load(from + e), row + h * b.dim + e);
          }
        }
      }
      joint.store_order(row);
    }
  });
}

void split_rows(const JointBlock& b) {
  const int n = static_cast<int>(b.heads * b.dim);
  JointRow joint(n, b.rotated, b.permutation, b.group);
  with_dtype(b.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t t = 0; t < b.tokens; ++t) {
      float* row = b.rows + t * n;
      joint.restore(row);
      for (int64_t h = 0; h < b.heads; ++h) {
        T* to = head_row<T>(b, t, h);
        const float* from = row + h * b.dim;
        for (int64_t d = 0; d < b.dim; d += 8) {
          if constexpr (W > 8) {
            store_partial(saturated<T>(load_partial(from + d, 8)), to + d, 8);
          } else {
            for (int64_t e = d; e < d + 8; e += W) store(saturated<T>(load(from + e)), to + e);
          }
        }
      }
    }
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
