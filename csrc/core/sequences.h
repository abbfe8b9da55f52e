// Packed sequences, and lists of their own for each sequence and head.
#pragma once

#include <cstdint>

#include "kvk/types.h"

namespace kvk {

// Boundaries of packed sequences, or one sequence.
struct Sequences {
  const int32_t* starts = nullptr;  // null: one sequence of `total` tokens
  int64_t stride = 0, count = 1, total = 0;

  int64_t begin(int64_t b) const { return starts ? starts[b * stride] : 0; }
  int64_t end(int64_t b) const { return starts ? starts[(b + 1) * stride] : total; }
  int64_t len(int64_t b) const { return end(b) - begin(b); }
};

// Element i of the list of sequence b and head h in t[B | 1, H | 1, N].
template <class E>
E* shared_at(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return t.ptr<E>() + (t.shape[0] > 1 ? b : 0) * t.stride[0] + (t.shape[1] > 1 ? h : 0) * t.stride[1] + i * t.stride[2];
}

}  // namespace kvk
