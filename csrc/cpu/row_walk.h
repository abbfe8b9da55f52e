// The rows of a tensor of any strides, one after the other.
#pragma once

#include <cstdint>

#include "kvk/types.h"

namespace kvk::cpu::KVK_LEVEL {

// Offsets of rows begin, begin + 1, ...: all dimensions but the last, counted like an odometer.
class RowWalk {
 public:
  RowWalk(const Tensor& t, int64_t begin) : t_(t) {
    for (int i = t.ndim - 2; i >= 0; --i) {
      at_[i] = begin % t.shape[i];
      begin /= t.shape[i];
      offset_ += at_[i] * t.stride[i];
    }
  }
  int64_t offset() const { return offset_; }
  void next() {
    for (int i = t_.ndim - 2; i >= 0; --i) {
      offset_ += t_.stride[i];
      if (++at_[i] < t_.shape[i]) return;
      offset_ -= at_[i] * t_.stride[i];
      at_[i] = 0;
    }
  }

 private:
  const Tensor& t_;
  int64_t at_[kMaxDims] = {};
  int64_t offset_ = 0;
};

}  // namespace kvk::cpu::KVK_LEVEL
