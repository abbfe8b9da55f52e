// How a quantized record is laid out: K or V of one page and kv head. docs/formats.md has it byte by byte. Both backends and
// the host code read it here.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

// How K, or V, is quantized.
struct QuantPart {
  int32_t bits;       // 2, 3, 4 or 8
  int32_t group;      // elements that share a scale
  bool along_tokens;  // groups run along tokens (axis "channel"); else along channels (axis "token")
  int32_t rotate;     // kv heads whose rows are stored after one orthonormal Hadamard transform; 0: as they are

  KVK_HOST_DEVICE constexpr int32_t joint_heads() const { return rotate > 1 ? rotate : 1; }
};

// Offsets into a record, in bytes. Its parts follow each other, each padded with zeros to a multiple of 16:
//   codes  [page_size][head_dim * bits / 8]
//   scale  f16 [page_size / group][head_dim]  or  [page_size][head_dim / group]
//   min    f16, as scale
struct QuantLayout {
  int64_t row_bytes;   // codes of one token
  int64_t num_scales;  // of the whole record
  int64_t scale_offset, min_offset;
  int64_t record_bytes;
};

KVK_HOST_DEVICE constexpr QuantLayout quant_layout(int64_t page_size, int64_t dim, const QuantPart& part) {
  QuantLayout layout = {};
  layout.row_bytes = dim * part.bits / 8;
  layout.num_scales = page_size * dim / part.group;
  layout.scale_offset = round_up<int64_t>(page_size * layout.row_bytes, 16);
  layout.min_offset = layout.scale_offset + round_up<int64_t>(layout.num_scales * 2, 16);
  layout.record_bytes = layout.min_offset + round_up<int64_t>(layout.num_scales * 2, 16);
  return layout;
}

}  // namespace kvk::device
