// What the array face knows of the call that this thread is in.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <vector>

namespace kvk::array {

struct CallState {
  void* stream = nullptr;
  // A new array of the library of `like`; takes the GIL itself.
  std::function<torch::stable::Tensor(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                      torch::headeronly::ScalarType dtype)>
      allocate;
};

CallState& current_call();

}  // namespace kvk::array
