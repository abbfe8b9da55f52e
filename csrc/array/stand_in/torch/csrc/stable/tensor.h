// Stands in for LibTorch's header of this name: a tensor is a view of what an array library handed over by DLPack.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace torch::stable {

// What a tensor shares with its copies. The memory belongs to the array behind `owner`.
struct Array {
  void* data = nullptr;
  headeronly::ScalarType dtype = headeronly::ScalarType::Undefined;
  int32_t element_size = 0;
  int32_t device_type = 1;  // DLPack's
  int32_t device_index = 0;
  bool read_only = false;
  std::vector<int64_t> shape, strides;
  std::shared_ptr<void> owner;  // the Python array, and its capsule
};

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(std::shared_ptr<const Array> array) : array_(std::move(array)) {}

  bool defined() const { return array_ != nullptr; }
  int64_t dim() const { return static_cast<int64_t>(array_->shape.size()); }
  int64_t size(int64_t i) const { return array_->shape[index(i)]; }
  int64_t stride(int64_t i) const { return array_->strides[index(i)]; }
  const std::vector<int64_t>& sizes() const { return array_->shape; }
  const std::vector<int64_t>& strides() const { return array_->strides; }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : array_->shape) n *= size;
    return n;
  }
  size_t element_size() const { return static_cast<size_t>(array_->element_size); }
  headeronly::ScalarType scalar_type() const { return array_->dtype; }
  bool is_cpu() const { return array_->device_type == 1 || array_->device_type == 3; }    // pinned memory, too
  bool is_cuda() const { return array_->device_type == 2 || array_->device_type == 13; }  // managed memory, too
  int32_t get_device_index() const { return is_cpu() ? 0 : array_->device_index; }
  const void* const_data_ptr() const { return array_->data; }
  void* mutable_data_ptr() const { return array_->data; }
  void* data_ptr() const { return array_->data; }
  const Array& array() const { return *array_; }

 private:
  size_t index(int64_t i) const { return static_cast<size_t>(i < 0 ? i + dim() : i); }
  std::shared_ptr<const Array> array_;
};

}  // namespace torch::stable
