#include "cpu/grid.h"

#include <algorithm>
#include <vector>

#include "cpu/levels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace kvk::cpu {

int heads_per_tile(int group, int64_t tokens) {
  const int64_t parts = (group * tokens + kGridTileRows - 1) / kGridTileRows;
  return static_cast<int>((group + parts - 1) / std::max<int64_t>(1, parts));
}

namespace {

const char* name_of(GridPass pass) {
  switch (pass) {
    case GridPass::attention: return "attention";
    case GridPass::query_gradient: return "gradient of queries";
    case GridPass::key_gradient: return "gradient of keys and values";
  }
  return "";
}

// Pairs of a row and a column that the tiles compute, whether the row sees the column or not.
int64_t visited_pairs(GridSchedule& schedule, int64_t num_tiles) {
  int64_t pairs = 0;
  const auto rows = std::make_unique<GridTile>();
  const auto columns = std::make_unique<GridColumns>();
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    schedule.begin(tile, *rows);
    const int64_t count = int64_t{rows->tokens.count} * rows->num_heads;
    while (schedule.next(*columns)) pairs += count * columns->tokens.count;
  }
  return pairs;
}

}  // namespace

void run_grid(GridPass pass, const GridProblem& problem, int64_t num_tiles, int max_rows,
              const std::function<std::unique_ptr<GridSchedule>()>& make, Threads& threads) {
  if (num_tiles == 0) return;
  const Kernels& level = kernels();
  const int workers = static_cast<int>(std::min<int64_t>(threads.count(), num_tiles));
  const int64_t scratch_bytes = (level.grid_scratch_bytes(pass, problem, max_rows) + 63) / 64 * 64;
  if (explain::Notes* notes = explain::notes()) {
    explain_grid(*notes, name_of(pass), num_tiles, max_rows, visited_pairs(*make(), num_tiles), scratch_bytes, workers);
    return;
  }
  const Buffer scratch = allocate(scratch_bytes * workers);
  std::vector<std::unique_ptr<GridSchedule>> schedules;
  for (int i = 0; i < workers; ++i) schedules.push_back(make());
  parallel_items(threads, workers, num_tiles, [&](int worker, int64_t tile) {
    level.grid_tile(pass, problem, *schedules[static_cast<size_t>(worker)], tile,
                    scratch.get() + worker * scratch_bytes);
  });
}

}  // namespace kvk::cpu
