// Attention over a paged KV cache, and the calls that fill it.
//
// Shapes: B requests, T packed query tokens, Hq / Hkv query / kv heads, D / Dv head dims of K / V, P page size, N pages.
// Tensors are all on the CPU, or all on one card; on a card work is queued on the context's stream, and page ids, lengths and
// slots are read there, and checked only with KVK_CHECK=1 (docs/cuda.md). float32 attention is the CPU's alone.
//
// The conventions (LSE, causal alignment, head map, empty rows, masks) are in docs/conventions.md, the forms of a page
// table in docs/page-tables.md.
#pragma once

#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk {

// Keys of each request, in one of three forms (docs/page-tables.md).
struct PageTable {
  Tensor page_indices;                // int32 [B, max_pages] | [B, Hkv, max_pages] | [nnz] with page_indptr
  std::optional<Tensor> page_indptr;  // int32 [B + 1] | [B * Hkv + 1]
  Tensor kv_lens;                     // int32 [B] | [B, Hkv]
};

// How a score becomes a weight: s = scale * q.k, soft cap, ALiBi, key bias, in this order; then the masks.
struct ScoreOptions {
  std::optional<double> softmax_scale;  // default D**-0.5
  int64_t window_left = -1;             // w >= 0: a query sees its own position and the w before it
  double logits_soft_cap = 0.0;         // c > 0: s becomes c * tanh(s / c)
  std::optional<Tensor> alibi_slopes;   // f32 [Hq]: s -= slope * |query position - key position|
  std::optional<Tensor> sinks;          // f32 [Hq]: a logit that joins the denominator and has no value
  std::optional<Tensor> key_bias;       // f32 [N, P] | [N, P, Hkv]: added to the score of that stored key
};

struct PagedDecodeArgs {
  Tensor q;        // [B, Hq, D], f32 | bf16 | f16, last stride 1
  Tensor k_pages;  // [N, P, Hkv, D], q's dtype, any strides with the last one 1 (NHD and HND alike)
  Tensor v_pages;  // [N, P, Hkv, Dv]
  PageTable table;
  ScoreOptions score;
  Tensor out;  // [B, Hq, Dv], q's dtype, written
  Tensor lse;  // f32 [B, Hq], natural log, written
};

struct PagedPrefillArgs {
  Tensor q;          // [T, Hq, D]
  Tensor qo_indptr;  // int32 [B + 1]: request b's tokens are q[qo_indptr[b] : qo_indptr[b + 1]]
  Tensor k_pages;    // [N, P, Hkv, D]; the keys of the query tokens are already in
  Tensor v_pages;    // [N, P, Hkv, Dv]
  PageTable table;
  ScoreOptions score;
  bool causal = true;               // bottom-right: token i of n sees keys up to L - n + i
  std::optional<Tensor> mask_bits;  // int32 [T, words], little-endian bits over the last W keys; 0 hides
  int64_t mask_width = -1;          // W; -1: the request's own number of query tokens
  Tensor out;                       // [T, Hq, Dv], written (rows of no request: 0)
  Tensor lse;                       // f32 [T, Hq], written (rows of no request: -inf)
};

struct AppendKvArgs {
  Tensor k;             // [T, Hkv, D]
  Tensor v;             // [T, Hkv, Dv]
  Tensor k_pages;       // [N, P, Hkv, D], written
  Tensor v_pages;       // [N, P, Hkv, Dv], written
  Tensor slot_mapping;  // i64 [T]: page * P + offset, all different; negative: the token is skipped
};

struct MergeStatesArgs {
  Tensor parts;      // [n, T, H, D], f32 | bf16 | f16, last stride 1
  Tensor parts_lse;  // f32 [n, T, H], natural log
  Tensor out;        // [T, H, D], written
  Tensor lse;        // f32 [T, H], written
};

// Gradient of merge_states, from its inputs and the gradients of its outputs.
struct MergeStatesBackwardArgs {
  Tensor grad_out;        // [T, H, D], the dtype of parts
  Tensor grad_lse;        // f32 [T, H]
  Tensor parts;           // [n, T, H, D]
  Tensor parts_lse;       // f32 [n, T, H]
  Tensor grad_parts;      // [n, T, H, D], written
  Tensor grad_parts_lse;  // f32 [n, T, H], written
};

KVK_API void paged_decode(const PagedDecodeArgs& args, const Context& context = {});
KVK_API void paged_prefill(const PagedPrefillArgs& args, const Context& context = {});
KVK_API void append_kv(const AppendKvArgs& args, const Context& context = {});
KVK_API void merge_states(const MergeStatesArgs& args, const Context& context = {});
KVK_API void merge_states_backward(const MergeStatesBackwardArgs& args, const Context& context = {});

}  // namespace kvk
