// How a bitmap-sparse record is laid out: K or V of one page and kv head. docs/formats.md has it byte by byte. Both backends
// and the host code read it here.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

// How K, or V, is thinned out.
struct BitmapPart {
  int32_t keep;    // elements of a row that are kept, a multiple of 8
  int32_t rotate;  // 1: rows are stored after an orthonormal Hadamard transform of the head dim; 0: as they are
};

// Offsets into a record, in bytes. Its parts follow each other, the bitmaps padded with zeros to a multiple of 16:
//   values  [page_size][keep], 16-bit floats, the kept elements of a row in the order of its channels
//   bitmap  [page_size][head_dim / 8], bit i of a row (low bits first): channel i is kept
// Values come first, so that a vector of 16 bytes that begins at any of them ends within the record.
struct BitmapLayout {
  int64_t value_row_bytes, bitmap_row_bytes;  // of one token
  int64_t bitmap_offset;
  int64_t record_bytes;
};

KVK_HOST_DEVICE constexpr BitmapLayout bitmap_layout(int64_t page_size, int64_t dim, const BitmapPart& part) {
  BitmapLayout layout = {};
  layout.value_row_bytes = part.keep * 2;
  layout.bitmap_row_bytes = dim / 8;
  layout.bitmap_offset = page_size * layout.value_row_bytes;  // a multiple of 16, since keep is one of 8
  layout.record_bytes = layout.bitmap_offset + round_up<int64_t>(page_size * layout.bitmap_row_bytes, 16);
  return layout;
}

}  // namespace kvk::device
