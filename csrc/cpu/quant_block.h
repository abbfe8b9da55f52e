// A block of rows on its way into or out of codes: what the threads hand to the kernels of a level.
#pragma once

#include "core/paged_problem.h"

namespace kvk::cpu {

struct QuantBlock {
  QuantPart part;
  float clip;  // quantize only
  int64_t tokens, dim;
  DType dtype;
  void* x;               // element 0 of the first row
  int64_t token_stride;  // elements
  uint8_t* codes;        // [tokens][dim * bits / 8]
  f16* scale;            // [tokens / group][dim] or [tokens][dim / group]
  f16* min;
  const void* ahead;  // x of the block that comes next, with the same strides, or null
};

// Rows of several kv heads side by side, on their way between dense pages and the rows that are quantized head by head.
struct JointBlock {
  int64_t tokens, dim, heads;
  DType dtype;
  void* x;                            // element 0 of the first head's first row
  int64_t token_stride, head_stride;  // elements
  bool rotated;
  Permutation permutation;
  int64_t group;  // the permutation's row
  float* rows;    // [tokens][heads * dim]
};

}  // namespace kvk::cpu
