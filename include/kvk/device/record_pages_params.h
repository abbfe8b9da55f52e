// Pools of records for the attention kernels; for the launch code and the kernels.
#pragma once

#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_prefill_params.h"

namespace kvk::device {

// K or V of all records, in bytes.
struct RecordPool {
  const uint8_t* data;
  int64_t page_stride, head_stride;
  int64_t part_offset[2];  // in a record, of what follows the first part: scale and min; or the bitmaps
};

struct Records {
  RecordPool k, v;
  int64_t num_pages;                     // records come first in key_bias, then dense pages
  float k_rotate_scale, v_rotate_scale;  // 1 / sqrt(head dim), of rotated records
};

struct RecordDecodeParams : PagedDecodeParams {
  Records records;
};
struct RecordPrefillParams : PagedPrefillParams {
  Records records;
};

inline constexpr int kRecordPlaceBytes = 32;  // sizeof(RecordPlace)

// Bytes of a row in a stage: whole chunks of 16 from a multiple of 16 in the record, since a row may start anywhere.
KVK_HOST_DEVICE constexpr int staged_row_bytes(int row) {
  const int aligned = (row & -row) < 16 ? row & -row : 16;  // every row starts on a multiple of it
  return round_up(row + 16 - aligned, 16);
}

// Of a run whose raw bytes take `records`; what rotated rows need.
KVK_HOST_DEVICE constexpr StagedBytes record_staged(int records, bool k_rotated, bool v_rotated) {
  StagedBytes staged;
  staged.records = records;
  staged.place = kRecordPlaceBytes;
  staged.scratch = k_rotated || v_rotated ? 32 * 8 * 4 : 16;  // a float for each element that a warp rotates
  staged.query_terms = k_rotated ? 3 : 1;
  return staged;
}

}  // namespace kvk::device
