// What a stage holds of bitmap-sparse records; for the launch code and the kernels.
#pragma once

#include "kvk/device/record_pages_params.h"
#include "kvk/device/sparse_layout.h"

namespace kvk::device {

// What a stage holds of K, or V, for a run of keys, raw.
//   values  [keys][value_bytes]
//   bitmap  [keys][bitmap_bytes], whole chunks of 16 from a multiple of 16 in the record
struct BitmapStage {
  int value_bytes, row_bytes;  // stored; of one key. row_bytes: of its bitmap
  int bitmap_bytes, bitmap_at, bytes;

  KVK_HOST_DEVICE constexpr BitmapStage(int dim, int keep, int keys)
      : value_bytes(keep * 2), row_bytes(dim / 8), bitmap_bytes(staged_row_bytes(row_bytes)),
        bitmap_at(keys * value_bytes), bytes(bitmap_at + keys * bitmap_bytes) {}
};

KVK_HOST_DEVICE constexpr StagedBytes bitmap_staged(int head_dim, int head_dim_v, const BitmapPart& k,
                                                    const BitmapPart& v, int keys) {
  return record_staged(BitmapStage(head_dim, k.keep, keys).bytes + BitmapStage(head_dim_v, v.keep, keys).bytes,
                       k.rotate != 0, v.rotate != 0);
}

}  // namespace kvk::device
