// Attention over ordinary tensors, cut into tiles: rows of one kv head (queries, or keys in the gradient of keys and
// values) against the columns that a schedule brings, up to 64 at a time. Which columns, and which of them each row sees,
// is all that a kind of sparsity has to say; the kernels (cpu/engine/grid.h, grid_gradient.h) do not know the kinds.
//
// A tile is one worker's alone, in every pass, and its columns come in an order that depends on the pattern alone: results
// are the same bit for bit in any batch and with any number of threads, gradients too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/grid_problem.h"
#include "kvk/threads.h"

namespace kvk::cpu {

inline constexpr int kGridColumns = 64;      // most columns of one step; a row's view of them is one word
inline constexpr int kGridTileTokens = 128;  // most tokens of one tile
inline constexpr int kGridTileRows = 192;    // about as many rows, tokens times heads, share the unpacking of columns

// Tokens at `at`, then every `step`-th along the last dimension of the grid.
struct GridRun {
  int64_t at[kGridDims];
  int32_t step;
  int32_t begin;  // index of the first within the tile or the columns
  int32_t count;
};

template <int kMost>
struct GridTokens {
  int32_t count = 0, num_runs = 0;
  GridRun runs[kMost];

  void clear() { count = num_runs = 0; }
  GridRun& add(int64_t batch, int64_t x, int64_t y, int64_t z, int64_t step, int64_t n) {
    GridRun& run = runs[num_runs++];
    run = {{batch, x, y, z}, static_cast<int32_t>(step), count, static_cast<int32_t>(n)};
    count += run.count;
    return run;
  }
};

// Rows are ordered (head, token). Rows that are keys have one head, the kv head.
struct GridTile {
  int32_t kv_head = 0, head_begin = 0, num_heads = 1;
  GridTokens<kGridTileTokens> tokens;
};

struct GridColumns {
  int32_t head = 0;     // the kv head, or the query head where the rows are keys
  bool masked = false;  // some row does not see some column: seen counts
  bool biased = false;
  GridTokens<kGridColumns> tokens;
  uint64_t seen[kGridTileTokens];  // per token of the tile; bit j: it sees column j
  float bias[kGridColumns];        // added to the scores of a column
};

// What walks over tiles and their columns; every worker has its own.
class GridSchedule {
 public:
  virtual ~GridSchedule() = default;
  virtual void begin(int64_t tile, GridTile& rows) = 0;
  virtual bool next(GridColumns& columns) = 0;  // of the tile begun last
};

// A word whose n lowest bits are 1; n below 0 and past 64 are as 0 and 64.
inline uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

enum class GridPass : uint8_t { attention, query_gradient, key_gradient };

// Runs the tiles [0, num_tiles) of one pass. make: a schedule for one worker. max_rows: of a tile, heads and all.
void run_grid(GridPass pass, const GridProblem& problem, int64_t num_tiles, int max_rows,
              const std::function<std::unique_ptr<GridSchedule>()>& make, Threads& threads);

// How many query heads of a group share a tile of `tokens` queries: even shares of at most about kGridTileRows rows.
int heads_per_tile(int group, int64_t tokens);

}  // namespace kvk::cpu
