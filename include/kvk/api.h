// What the library exports, its version, and the error it throws.
#pragma once

#include <stdexcept>
#include <string>

#define KVK_API __attribute__((visibility("default")))

#define KVK_VERSION_MAJOR 0
#define KVK_VERSION_MINOR 1
#define KVK_VERSION_PATCH 0

namespace kvk {

// Thrown for every bad argument, before any memory is touched. what() reads
// "kvk::paged_decode: page_indices must be int32, got int64".
class KVK_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// "0.1.0"
KVK_API const char* version();

// The instruction-set level the CPU kernels run at: the best of this build that the machine has. The environment
// variable KVK_CPU_LEVEL (read once) asks for a lower one, e.g. "x86-64-v2".
KVK_API const char* cpu_level();

}  // namespace kvk
