// Parameters of the merge_states kernels.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

// Element 0 of (part, token, head).
struct PartsView {
  void* data;
  int64_t part_stride, token_stride, head_stride;  // elements
};

struct MergeStatesParams {
  PartsView parts, parts_lse;  // [num_parts, num_tokens, num_heads, head_dim] and fp32 [..]
  PartsView out, lse;          // without part_stride; written
  int64_t num_parts, num_tokens, num_heads, head_dim;
};

struct MergeStatesBackwardParams {
  PartsView grad_out, grad_lse;  // of the merged out and lse; without part_stride
  PartsView parts, parts_lse;
  PartsView grad_parts, grad_parts_lse;  // written
  int64_t num_parts, num_tokens, num_heads, head_dim;
};

}  // namespace kvk::device
