#include "core/check.h"

#include <cmath>
#include <cstdint>

#include "core/value_errors.h"

namespace kvk {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f64: return "float64";
    case DType::i64: return "int64";
    case DType::i32: return "int32";
    case DType::i16: return "int16";
    case DType::i8: return "int8";
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
    case DType::other: break;
  }
  return "a dtype that kvk does not know";
}

std::string device_name(Device device) {
  switch (device.type) {
    case DeviceType::cpu: return "cpu";
    case DeviceType::cuda: return "cuda:" + std::to_string(device.index);
    case DeviceType::other: break;
  }
  return "a device that kvk does not know";
}

std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  for (int i = 0; i < t.ndim; ++i) text << (i ? ", " : "[") << t.shape[i];
  text << (t.ndim == 0 ? "[]" : "]");
  return text.str();
}

void ArgChecker::tensor(const Tensor& t, const char* name, DType dtype, std::span<const Dim> dims) const {
  if (!(t.device == device_)) {
    fail(op_, name, " must be on ", device_name(device_), " like the other arguments, got ", device_name(t.device));
  }
  if (t.dtype != dtype) fail(op_, name, " must be ", dtype_name(dtype), ", got ", dtype_name(t.dtype));
  bool match = t.ndim == static_cast<int>(dims.size());
  int i = 0;
  for (const Dim& dim : dims) {
    if (match && dim.size >= 0 && t.shape[i] != dim.size) match = false;
    ++i;
  }
  if (match) return;
  std::ostringstream want;
  const char* separator = "[";
  for (const Dim& dim : dims) {
    want << separator << dim.label;
    if (dim.size >= 0) want << '=' << dim.size;
    separator = ", ";
  }
  fail(op_, name, " must have shape ", want.str(), "], got ", shape_string(t));
}

void ArgChecker::same_shape(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const {
  if (!(t.device == device_)) {
    fail(op_, name, " must be on ", device_name(device_), " like the other arguments, got ", device_name(t.device));
  }
  if (t.dtype != as.dtype) fail(op_, name, " must be ", dtype_name(as.dtype), ", got ", dtype_name(t.dtype));
  bool match = t.ndim == as.ndim;
  for (int i = 0; match && i < t.ndim; ++i) match = t.shape[i] == as.shape[i];
  if (!match) {
    fail(op_, name, " must have shape ", shape_string(as), " like ", as_name, ", got ", shape_string(t));
  }
}

void ArgChecker::contiguous(const Tensor& t, const char* name) const {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0 && t.numel() > 0; stride *= t.shape[i--]) {
    if (t.shape[i] > 1 && t.stride[i] != stride) {
      fail(op_, name, " must be contiguous, got stride ", t.stride[i], " in dimension ", i);
    }
  }
}

void ArgChecker::aligned_rows(const Tensor& t, const char* name) const {
  if (device_.type != DeviceType::cuda) return;
  const int64_t size = element_size(t.dtype);
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) fail(op_, name, " must start on a multiple of 16 bytes on a card");
  for (int i = 0; i + 1 < t.ndim; ++i) {
    if (t.shape[i] > 1 && t.stride[i] * size % 16 != 0) {
      fail(op_, name, " must have strides of whole 16 bytes on a card, got ", t.stride[i], " elements in dimension ",
           i);
    }
  }
}

void ArgChecker::no_f32_on_card(const Tensor& t, const char* name) const {
  if (device_.type == DeviceType::cuda && t.dtype == DType::f32) {
    fail(op_, name, " must be bfloat16 or float16 on a card, got float32");
  }
}

void ArgChecker::float_dtype(const Tensor& t, const char* name) const {
  if (t.dtype != DType::f32 && t.dtype != DType::bf16 && t.dtype != DType::f16) {
    fail(op_, name, " must be float32, bfloat16 or float16, got ", dtype_name(t.dtype));
  }
}

void ArgChecker::last_stride_one(const Tensor& t, const char* name) const {
  const int last = t.ndim - 1;
  if (t.shape[last] > 1 && t.stride[last] != 1) {
    fail(op_, name, " must have stride 1 in its last dimension, got ", t.stride[last]);
  }
}

void ArgChecker::writable(const Tensor& t, const char* name) const {
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] > 1 && t.stride[i] == 0) {
      fail(op_, name, " is written and may not be expanded, got stride 0 in dimension ", i);
    }
  }
}

void ArgChecker::head_dim(int64_t size, const char* name, const char* label) const {
  if (size < 32 || size > 256 || size % 8 != 0) {
    fail(op_, name, ": head dim ", label, " must be a multiple of 8 from 32 to 256, got ", size);
  }
}

void ArgChecker::starts(const Tensor& starts, const char* name, int64_t limit, const char* of) const {
  if (device_.type != DeviceType::cpu) return;
  int64_t previous = 0;
  for (int64_t i = 0; i < starts.shape[0]; ++i) {
    const int64_t start = starts.ptr<const int32_t>()[i * starts.stride[0]];
    if (i == 0 && start != 0) fail_first_start(op_, name, start);
    if (start < previous) fail_decreasing_start(op_, name, start, previous, i);
    previous = start;
  }
  if (previous > limit) fail_last_start(op_, name, limit, of, previous);
}

void ArgChecker::finite(double value, const char* name) const {
  if (!std::isfinite(value)) fail(op_, name, " must be finite, got ", value);
}

}  // namespace kvk
