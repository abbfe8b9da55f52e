// Pools of quantized records for the attention kernels, and what a stage holds of them; for the launch code and the kernels.
#pragma once

#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/device/quant_layout.h"

namespace kvk::device {

// K or V of all records, in bytes.
struct RecordPool {
  const uint8_t* data;
  int64_t page_stride, head_stride;
  int64_t scale_offset, min_offset;  // in a record
};

struct QuantRecords {
  RecordPool k, v;
  int64_t num_pages;                     // records come first in key_bias, then dense pages
  float k_rotate_scale, v_rotate_scale;  // 1 / sqrt(head dim), of rotated records
};

struct QuantDecodeParams : PagedDecodeParams {
  QuantRecords records;
};
struct QuantPrefillParams : PagedPrefillParams {
  QuantRecords records;
};

// What a stage holds of K, or V, for a run of keys at consecutive positions: raw bytes, in whole chunks of 16 from a multiple of
// 16 in the record, since a row may start anywhere.
//   codes       [keys][code_bytes]
//   scale, min  [scale_rows][scale_bytes] each: of every key (groups along channels), or of every group of tokens that the run
//               touches (groups along tokens)
struct QuantStage {
  int row_bytes, scale_row_bytes;  // stored; of one key, or one group of tokens
  int code_bytes, scale_bytes, scale_rows;
  int scale_at, min_at, bytes;

  KVK_HOST_DEVICE static constexpr int chunks(int row) {
    const int aligned = (row & -row) < 16 ? row & -row : 16;  // every row starts on a multiple of it
    return round_up(row + 16 - aligned, 16);
  }
  KVK_HOST_DEVICE constexpr QuantStage(int dim, const QuantPart& part, int keys)
      : row_bytes(dim * part.bits / 8), scale_row_bytes(part.along_tokens ? dim * 2 : dim / part.group * 2),
        code_bytes(chunks(row_bytes)), scale_bytes(chunks(scale_row_bytes)),
        scale_rows(part.along_tokens ? (keys - 2) / part.group + 2 : keys), scale_at(keys * code_bytes),
        min_at(scale_at + scale_rows * scale_bytes), bytes(min_at + scale_rows * scale_bytes) {}
};

inline constexpr int kRecordPlaceBytes = 32;  // sizeof(RecordPlace)

KVK_HOST_DEVICE constexpr StagedBytes quant_staged(int head_dim, int head_dim_v, const QuantPart& k, const QuantPart& v,
                                                   int keys) {
  StagedBytes staged;
  staged.records = QuantStage(head_dim, k, keys).bytes + QuantStage(head_dim_v, v, keys).bytes;
  staged.place = kRecordPlaceBytes;
  staged.scratch = k.rotate != 0 || v.rotate != 0 ? 32 * 8 * 4 : 16;  // a float for each element that a warp rotates
  staged.query_terms = k.rotate != 0 ? 3 : 1;
  return staged;
}

}  // namespace kvk::device
