// The pattern of block-sparse attention, as the kernels walk over it.
#pragma once

#include "kvk/device/grid_params.h"

namespace kvk::device {

// Boundaries of packed sequences, int32 [count + 1] on the card; null: one sequence of all tokens.
struct PackedSequences {
  const int32_t* starts;
  int64_t stride;
  int32_t count, num_tokens;

  // Starts that are off never lead past the tokens.
  KVK_HOST_DEVICE int32_t begin(int32_t b) const {
    if (starts == nullptr) return b == 0 ? 0 : num_tokens;
    const int32_t at = starts[b * stride];
    return at < 0 ? 0 : at < num_tokens ? at : num_tokens;
  }
  KVK_HOST_DEVICE int32_t len(int32_t b) const {
    const int32_t n = begin(b + 1) - begin(b);
    return n > 0 ? n : 0;
  }
};

// t[B | 1, Hq | 1, N]: a stride is 0 where the list is shared.
template <class E>
struct SharedLists {
  const E* data;
  int64_t batch_stride, head_stride, stride;

  KVK_HOST_DEVICE const E* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch_stride + h * head_stride + i * stride;
  }
};

struct BlockEntry {
  int32_t row, entry;  // query block, and where its list names the key block
};

struct BlockSparseParams {
  PackedSequences queries, keys;
  SharedLists<int32_t> row_ptr;   // [.., block_rows + 1]
  SharedLists<int32_t> col_idx;   // [.., num_entries]
  SharedLists<float> entry_bias;  // like col_idx; read where a kernel has kKeyBias
  int64_t num_entries;
  int32_t block_rows, block_q, block_k;
  int32_t heads;  // query heads of a query block's tiles: all of a kv head, where they share a pattern, else one
  bool causal;
  // The transposed pattern, where rows are keys: entries of key block n are [starts(n), starts(n + 1)), by their rows.
  SharedLists<int32_t> column_starts;
  SharedLists<BlockEntry> column_entries;
  int32_t block_columns;
};

inline constexpr int kTransposeThreads = 512;

struct BlockTransposeParams {
  BlockSparseParams pattern;
  int32_t heads;        // of the pattern
  int32_t* starts;      // [batches * heads, block_columns + 1], written
  BlockEntry* entries;  // [batches * heads, num_entries], written as far as the lists go
};

struct BlockSparse {
  using Params = BlockSparseParams;
  static constexpr int kItemBytes = 96;
  KVK_HOST_DEVICE static constexpr size_t shared_bytes(int, int) { return kItemBytes; }
  template <class Config>
  class Walk;
};

}  // namespace kvk::device
