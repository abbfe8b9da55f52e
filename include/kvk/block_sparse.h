// Attention whose pattern is blocks of queries against blocks of keys, and its gradient.
//
// Shapes: T / S packed query / key tokens of B sequences, Hq / Hkv query / kv heads, D / Dv head dims of K / V. Query block m
// of a sequence is its queries [m * block_q, (m + 1) * block_q), key block n likewise; the last ones may be short. Mb: rows
// of the pattern, at least as many as the longest sequence has query blocks. The conventions (LSE, causal alignment, head
// map, empty rows) are in docs/conventions.md, the patterns in docs/block-sparse.md.
#pragma once

#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk {

// Which key blocks each query block visits, as CSR of its own for each sequence and head; a leading 1 is shared by all.
struct BlockPattern {
  Tensor row_ptr;                    // int32 [B | 1, Hq | 1, Mb + 1]
  Tensor col_idx;                    // int32 [B | 1, Hq | 1, NNZ]; within a row in any order
  int64_t block_q = 0, block_k = 0;  // 16 to 128
  std::optional<Tensor> entry_bias;  // f32, like col_idx: added to all scores of that block
};

struct BlockSparseAttentionArgs {
  Tensor q;  // [T, Hq, D], f32 | bf16 | f16, last stride 1
  Tensor k;  // [S, Hkv, D], q's dtype
  Tensor v;  // [S, Hkv, Dv]
  BlockPattern pattern;
  std::optional<Tensor> cu_seqlens_q;  // int32 [B + 1], with cu_seqlens_k; without: one sequence
  std::optional<Tensor> cu_seqlens_k;
  bool causal = false;                  // aligned bottom right, on top of the pattern
  std::optional<double> softmax_scale;  // default D**-0.5
  Tensor out;                           // [T, Hq, Dv], q's dtype, written
  Tensor lse;                           // f32 [T, Hq], natural log, written
};

// The gradient with respect to q, k and v. `forward` is the call whose gradient it is, but its out and lse are read: they
// may be those of a merge with other branches, for this branch's part of the merged gradient.
struct BlockSparseAttentionBackwardArgs {
  BlockSparseAttentionArgs forward;
  Tensor grad_out;    // [T, Hq, Dv], q's dtype
  Tensor grad_lse;    // f32 [T, Hq]
  Tensor dq, dk, dv;  // like q, k, v, written
};

// MInference's vertical-slash heads: causal attention to some keys (vertical) and some distances (slash). A distance is a band
// of 64 keys for each block of 64 queries, so that it holds that distance for all of them.
struct VerticalSlashAttentionArgs {
  Tensor q;         // [T, Hq, D], f32 | bf16 | f16, last stride 1
  Tensor k;         // [S, Hkv, D], q's dtype
  Tensor v;         // [S, Hkv, Dv]
  Tensor vertical;  // int32 [B | 1, Hq | 1, NV], keys of the sequence; any order, those it does not have are ignored
  Tensor slash;     // int32 [B | 1, Hq | 1, NS], query position - key position; likewise
  std::optional<Tensor> cu_seqlens_q;
  std::optional<Tensor> cu_seqlens_k;
  std::optional<double> softmax_scale;  // default D**-0.5
  Tensor out;                           // [T, Hq, Dv], q's dtype, written
  Tensor lse;                           // f32 [T, Hq], natural log, written
};

KVK_API void vertical_slash_attention(const VerticalSlashAttentionArgs& args, const Context& context = {});
KVK_API void block_sparse_attention(const BlockSparseAttentionArgs& args, const Context& context = {});
KVK_API void block_sparse_attention_backward(const BlockSparseAttentionBackwardArgs& args, const Context& context = {});

}  // namespace kvk
