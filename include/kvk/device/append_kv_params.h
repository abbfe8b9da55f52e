// Parameters of the append kernel.
#pragma once

#include "kvk/device/paged_problem.h"

namespace kvk::device {

struct AppendKvParams {
  RowsView k, v;              // [num_tokens, num_kv_heads, head_dim] and [.., head_dim_v]
  PoolView k_pages, v_pages;  // written
  const int64_t* slots;       // [num_tokens]; negative: skip
  int64_t slot_stride;
  int64_t num_tokens, num_kv_heads, page_size, num_slots;
  int32_t head_dim, head_dim_v;
  bool vectors;  // every row starts on a multiple of 16 bytes
};

}  // namespace kvk::device
