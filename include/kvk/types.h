// Scalar types, devices and the non-owning tensor view that every kvk call takes.
#pragma once

#include <cstdint>

namespace kvk {

// Storage-only 16-bit floats: kvk converts on load and store and computes in fp32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : uint8_t { f32, bf16, f16, f64, i64, i32, i16, i8, u8, boolean, other };

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16: return 2;
    case DType::i8:
    case DType::u8:
    case DType::boolean: return 1;
    case DType::other: break;
  }
  return 0;
}

enum class DeviceType : uint8_t { cpu, cuda, other };

struct Device {
  DeviceType type = DeviceType::cpu;
  int32_t index = 0;  // which card; 0 on the CPU

  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxDims = 6;

// A view of memory that somebody else owns. Strides are in elements, may be any number (0 included), and need not be
// ordered; data may be null only when the tensor has no elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

}  // namespace kvk
