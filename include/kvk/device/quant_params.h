// Parameters of the kernels that make and read codes, and how their warps are laid over a matrix; for the launch code and the
// kernels.
#pragma once

#include "kvk/device/quant_layout.h"
#include "kvk/device/record_params.h"

namespace kvk::device {

struct QuantParams : RecordMatrices {
  PackedView codes, scale, min;
  int32_t group;
  float clip;             // quantize only
  int64_t padding[3][2];  // of records: [begin, end) of the zeros behind codes, scale and min, from the record's start
};

// How a warp is laid over a matrix: 8 channels a lane, several tokens beside each other where a row needs few lanes.
struct QuantLanes {
  int lanes;    // of one row, or of one group along channels
  int rows;     // rows, or groups, side by side
  int columns;  // blocks of lanes * 8 channels of a row

  // By rows: dequantize, and quantize with groups along tokens.
  KVK_HOST_DEVICE static constexpr QuantLanes of_rows(int64_t dim) {
    const int units = static_cast<int>(dim / 8), lanes = units < 32 ? units : 32;
    return {lanes, 32 / lanes, ceil_div(units, lanes)};
  }
  // By groups along channels. With whole rows, as the Hadamard transform wants them.
  KVK_HOST_DEVICE static constexpr QuantLanes of_groups(int64_t dim, int group, bool whole_rows) {
    const int lanes = group / 8;
    const int rows = whole_rows ? 32 / static_cast<int>(dim / 8) * static_cast<int>(dim / group) : 32 / lanes;
    return {lanes, rows, 1};
  }
};

// kRotated: 0, or the dim of rows that are stored after a Hadamard transform.
template <class T_, int kBits_, bool kAlongTokens_, int kRotated_>
struct QuantCoding {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr bool kAlongTokens = kAlongTokens_;
  static constexpr int kRotated = kRotated_;
};

// Warps that a matrix takes.
KVK_HOST_DEVICE constexpr int64_t quantize_warps(int64_t tokens, int64_t dim, const QuantPart& part) {
  if (part.along_tokens) return tokens / part.group * QuantLanes::of_rows(dim).columns;
  return ceil_div<int64_t>(tokens * (dim / part.group), QuantLanes::of_groups(dim, part.group, part.rotate != 0).rows);
}
KVK_HOST_DEVICE constexpr int64_t dequantize_warps(int64_t tokens, int64_t dim) {
  const QuantLanes lanes = QuantLanes::of_rows(dim);
  return ceil_div<int64_t>(tokens, lanes.rows) * lanes.columns;
}

}  // namespace kvk::device
