// Parameters of the kernels that make and read records of bitmaps; for the launch code and the kernels.
#pragma once

#include "kvk/device/record_params.h"
#include "kvk/device/sparse_layout.h"

namespace kvk::device {

struct SparseParams : RecordMatrices {
  PackedView records;
  int32_t keep;
  int64_t bitmap_offset, record_bytes;
  const void* select;  // null, or [n, tokens, heads, ..] of what the kernel's Select says
  int64_t select_page_stride, select_token_stride, select_head_stride;  // elements
  bool select_vectors;  // every row of it starts on a multiple of 16 bytes
};

// Which elements of a row are kept.
enum class Select {
  magnitude,  // the largest
  scores,     // those of the largest float
  mask,       // those of bytes that are not 0
  bitmap,     // those of bits that are set
};

// In: of the dense rows; Value: of the records. kRotated: rows are transformed first.
template <class In_, class Value_, int kDim_, bool kRotated_, Select kSelect_>
struct SparseCoding {
  using In = In_;
  using Value = Value_;
  static constexpr int kDim = kDim_;
  static constexpr bool kRotated = kRotated_;
  static constexpr Select kSelect = kSelect_;
};

// Rows that a warp takes at a time, 8 channels a lane; warps that a matrix takes.
KVK_HOST_DEVICE constexpr int sparse_rows(int64_t dim) { return 32 / static_cast<int>(dim / 8); }
KVK_HOST_DEVICE constexpr int64_t sparse_warps(int64_t tokens, int64_t dim) {
  return ceil_div<int64_t>(tokens, sparse_rows(dim));
}

}  // namespace kvk::device
