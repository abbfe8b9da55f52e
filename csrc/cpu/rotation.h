// The Hadamard transform of fp32 rows in place, for those who need no other: compiled once a level, in hadamard_kernels.cc.
#pragma once

#include <cstdint>

namespace kvk::cpu::KVK_LEVEL {

// row = H row / sqrt(n), or H^T row. scratch: rotation_scratch(n) floats on a multiple of 64 bytes.
int64_t rotation_scratch(int n);
void rotate_row(int n, bool transpose, float* row, float* scratch);

}  // namespace kvk::cpu::KVK_LEVEL
