// Between torch's stable ABI and the C++ face: tensors become views, torch's pool becomes kvk::Threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "kvk/context.h"
#include "kvk/types.h"
#include "torch/recorded.h"

namespace kvk::torch_face {

using TorchTensor = torch::stable::Tensor;

// device.cc: where a tensor lies, and torch's current stream there (null on the CPU).
Device device_of(const TorchTensor& t);
void* current_stream(const Device& device);

DType dtype_of(torch::headeronly::ScalarType type);
Tensor view(const TorchTensor& t);
std::optional<Tensor> view(const std::optional<TorchTensor>& t);

// A new contiguous tensor on the device of `like`.
TorchTensor new_tensor(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       torch::headeronly::ScalarType dtype);

// The same shape and dtype, contiguous.
TorchTensor new_like(const TorchTensor& t);

// torch's threads, torch's current stream, memory from torch's allocator: lives as long as the call.
class TorchContext final : public Allocator {
 public:
  // like: any tensor of the call, for its device.
  explicit TorchContext(const TorchTensor& like);
  operator const Context&() const { return context_; }
  void* allocate(Device device, int64_t bytes) override;

 private:
  const TorchTensor& like_;
  Context context_;
  std::vector<TorchTensor> memory_;  // torch's caching allocator hands it out again in stream order
};

}  // namespace kvk::torch_face
