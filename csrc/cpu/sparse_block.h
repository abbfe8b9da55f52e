// The rows of one record on their way into or out of bitmaps: what the threads hand to the kernels of a level.
#pragma once

#include "kvk/sparse.h"

namespace kvk::cpu {

struct SparseBlock {
  BitmapPart part;
  DType value_dtype;  // bf16 or f16
  int64_t tokens, dim;
  DType dtype;           // of x: value_dtype; compress only: or f32
  void* x;               // element 0 of the first row
  int64_t token_stride;  // elements
  uint8_t* values;       // [tokens][keep]
  uint8_t* bitmap;       // [tokens][dim / 8]
  // Compress only: scores (f32), a mask (boolean) or bitmaps (u8) of the rows; null: by magnitude.
  const char* select;
  DType select_dtype;
  int64_t select_stride;  // bytes
  const void* ahead;      // compress only: x of the block that comes next, with the same strides, or null
};

}  // namespace kvk::cpu
