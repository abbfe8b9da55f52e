// Stands in for LibTorch's header of this name where the array face compiles csrc/torch (csrc/array/README.md).
#pragma once

#include <cstdint>

namespace torch::headeronly {

enum class ScalarType : int8_t { Byte, Char, Short, Int, Long, Half, Float, Double, Bool, BFloat16, Undefined };

}  // namespace torch::headeronly
