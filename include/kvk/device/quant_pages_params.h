// What a stage holds of quantized records; for the launch code and the kernels.
#pragma once

#include "kvk/device/quant_layout.h"
#include "kvk/device/record_pages_params.h"

namespace kvk::device {

// What a stage holds of K, or V, for a run of keys at consecutive positions: raw bytes, in whole chunks of 16 from a multiple of
// 16 in the record, since a row may start anywhere.
//   codes       [keys][code_bytes]
//   scale, min  [scale_rows][scale_bytes] each: of every key (groups along channels), or of every group of tokens that the run
//               touches (groups along tokens)
struct QuantStage {
  int row_bytes, scale_row_bytes;  // stored; of one key, or one group of tokens
  int code_bytes, scale_bytes, scale_rows;
  int scale_at, min_at, bytes;

  KVK_HOST_DEVICE constexpr QuantStage(int dim, const QuantPart& part, int keys)
      : row_bytes(dim * part.bits / 8), scale_row_bytes(part.along_tokens ? dim * 2 : dim / part.group * 2),
        code_bytes(staged_row_bytes(row_bytes)), scale_bytes(staged_row_bytes(scale_row_bytes)),
        scale_rows(part.along_tokens ? (keys - 2) / part.group + 2 : keys), scale_at(keys * code_bytes),
        min_at(scale_at + scale_rows * scale_bytes), bytes(min_at + scale_rows * scale_bytes) {}
};

KVK_HOST_DEVICE constexpr StagedBytes quant_staged(int head_dim, int head_dim_v, const QuantPart& k, const QuantPart& v,
                                                   int keys) {
  return record_staged(QuantStage(head_dim, k, keys).bytes + QuantStage(head_dim_v, v, keys).bytes, k.rotate != 0,
                       v.rotate != 0);
}

}  // namespace kvk::device
