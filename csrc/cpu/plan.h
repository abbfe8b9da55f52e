// How one call of attention is cut into work.
//
// A tile is a run of one request's query tokens and the query heads of some kv heads. The keys a tile sees are split at
// fixed multiples of its split length, an item is one split of one tile. Where a request is cut depends on that request
// and on the pool's shape alone, never on the batch or the number of threads: that is what makes results bit-identical
// alone and in any batch. Only how many kv heads share a tile may follow the load, because heads never mix.
#pragma once

#include <cstdint>
#include <vector>

#include "core/paged_problem.h"

namespace kvk::cpu {

// A tile of at most this many query rows per kv head goes row by row straight over the stored keys (memory-bound
// decode); a taller one unpacks keys into fp32 panels first (arithmetic-bound prefill). Measured over 8k keys, 4 query heads
// a kv head, AVX2: 20 rows take 8.9 ms and 10.1, 24 rows 10.5 and 9.8.
inline constexpr int kMaxStreamRows = 20;
// Rows of a panel tile for each kv head, and what they are padded to: a multiple of every level's register block. More rows
// share the unpacking of a block but compute more of its masked corner.
inline constexpr int kPanelRows = 192;
inline constexpr int kPanelRowStep = 12;
inline constexpr int kBlockKeys = 64;          // most keys of one block
inline constexpr int64_t kStreamSplit = 1024;  // keys; a partial result costs under 1% of reading them
inline constexpr int64_t kPanelSplit = 4096;   // keys

struct Tile {
  int32_t request, head_begin, head_end;  // kv heads
  int32_t num_tokens;
  int64_t token;               // first row of q
  int64_t first_query;         // position of that token among the request's keys
  int64_t len;                 // keys of the request
  int64_t mask_width;          // W of mask_bits
  int64_t key_begin, key_end;  // keys that some row of the tile may see
  int64_t partial;             // first row of the partial results, when there are several splits
  int32_t num_splits;
  bool stream;

  int64_t split_len() const { return stream ? kStreamSplit : kPanelSplit; }
  int rows_per_head(int group) const { return num_tokens * group; }
  int rows(int group) const { return rows_per_head(group) * (head_end - head_begin); }
  // Rows of a kv head in a worker's memory.
  int padded_rows_per_head(int group) const {
    const int rows = rows_per_head(group);
    return stream ? rows : (rows + kPanelRowStep - 1) / kPanelRowStep * kPanelRowStep;
  }
};

struct Item {
  int32_t tile, split;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;  // the longest first within a request
  int64_t partial_rows = 0;
  int32_t max_stream_rows = 0;  // most rows of one tile, all heads together
  int32_t max_panel_rows = 0;   // the same, padded
  int32_t max_panel_rows_per_head = 0;
  int32_t block_keys = 0;  // keys a stream tile takes at a time
};

Plan make_plan(const PagedProblem& problem, int num_workers);

}  // namespace kvk::cpu
