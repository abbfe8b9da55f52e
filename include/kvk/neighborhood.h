// Neighborhood attention in one, two and three dimensions, and its gradient: NATTEN's semantics (docs/neighborhood.md).
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk {

// Which keys a query sees along one dimension. With a dilation of d the positions fall into d groups, x and y in one group
// if x mod d = y mod d, and all that follows is said of the places i = x div d within a group.
struct NeighborhoodAxis {
  int64_t kernel_size = 1;  // keys of a window; kernel_size * dilation is at most the extent
  int64_t stride = 1;       // up to kernel_size: so many queries in a row share the window of one of them
  int64_t dilation = 1;
  bool is_causal = false;  // no key behind the query
};

// X.. are 1, 2 or 3 dimensions; the first as many axes hold.
struct NeighborhoodAttentionArgs {
  Tensor q;  // [B, X.., Hq, D], f32 | bf16 | f16, any strides with the last one 1
  Tensor k;  // [B, X.., Hkv, D], q's dtype
  Tensor v;  // [B, X.., Hkv, Dv]
  std::array<NeighborhoodAxis, 3> axes;
  std::optional<double> softmax_scale;  // default D**-0.5
  Tensor out;                           // [B, X.., Hq, Dv], q's dtype, written
  Tensor lse;                           // f32 [B, X.., Hq], natural log, written
};

// The gradient with respect to q, k and v. out and lse of `forward` are read; they may be those of a merge.
struct NeighborhoodAttentionBackwardArgs {
  NeighborhoodAttentionArgs forward;
  Tensor grad_out;    // [B, X.., Hq, Dv], q's dtype
  Tensor grad_lse;    // f32 [B, X.., Hq]
  Tensor dq, dk, dv;  // like q, k, v, written
};

KVK_API void neighborhood_attention(const NeighborhoodAttentionArgs& args, const Context& context = {});
KVK_API void neighborhood_attention_backward(const NeighborhoodAttentionBackwardArgs& args,
                                             const Context& context = {});

}  // namespace kvk
