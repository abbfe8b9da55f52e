// Tensors of tokens on a grid: a batch and up to three dimensions. Packed sequences use the last one.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

inline constexpr int kGridDims = 4;

// Element 0 of (token, head): data + sum of at[i] * stride[i] + head * head_stride.
struct GridView {
  void* data = nullptr;
  int64_t stride[kGridDims] = {};  // elements; 0 for a dimension that the tensor does not have
  int64_t head_stride = 0;

  template <class Index>
  KVK_HOST_DEVICE int64_t offset(const Index* at) const {
    int64_t sum = 0;
    for (int i = 0; i < kGridDims; ++i) sum += at[i] * stride[i];
    return sum;
  }
  template <class T, class Index>
  KVK_HOST_DEVICE T* token(const Index* at) const {
    return static_cast<T*>(data) + offset(at);
  }
};

}  // namespace kvk::device
