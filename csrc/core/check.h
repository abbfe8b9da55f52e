// Argument checks of every op, and the wording of their errors: which argument, what it must be, what came.
#pragma once

#include <initializer_list>
#include <span>
#include <sstream>
#include <string>

#include "kvk/api.h"
#include "kvk/types.h"

namespace kvk {

const char* dtype_name(DType dtype);
std::string device_name(Device device);
std::string shape_string(const Tensor& t);

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "kvk::" << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

// One expected extent of a shape: a number, or anything.
struct Dim {
  const char* label;  // as in "[B, Hq, D]"
  int64_t size = -1;  // -1: free
};

// Checks one op's tensors against each other. Every member throws kvk::Error.
class ArgChecker {
 public:
  ArgChecker(const char* op, Device device) : op_(op), device_(device) {}

  // Rank, every fixed extent, dtype and device.
  void tensor(const Tensor& t, const char* name, DType dtype, std::span<const Dim> dims) const;
  void tensor(const Tensor& t, const char* name, DType dtype, std::initializer_list<Dim> dims) const {
    tensor(t, name, dtype, std::span(dims.begin(), dims.size()));
  }
  // Dtype, device and shape of another argument.
  void same_shape(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const;
  void contiguous(const Tensor& t, const char* name) const;
  // On a card rows move 16 bytes at a time; a no-op on the CPU.
  void aligned_rows(const Tensor& t, const char* name) const;
  // bf16, f16 or f32.
  void float_dtype(const Tensor& t, const char* name) const;
  // Where f32 would need another kind of matrix instruction; a no-op on the CPU.
  void no_f32_on_card(const Tensor& t, const char* name) const;
  // The vector loads run along the last dimension.
  void last_stride_one(const Tensor& t, const char* name) const;
  // A written tensor may not visit one element twice through a zero stride.
  void writable(const Tensor& t, const char* name) const;
  void head_dim(int64_t size, const char* name, const char* label) const;
  void finite(double value, const char* name) const;
  // Starts of consecutive runs: from 0, never decreasing, within `limit`. Values on a card are trusted; with KVK_CHECK=1
  // csrc/cuda/check_values.cc checks them there.
  void starts(const Tensor& starts, const char* name, int64_t limit, const char* of) const;

  const char* op() const { return op_; }
  Device device() const { return device_; }

 private:
  const char* op_;
  Device device_;
};

}  // namespace kvk
