#include "cpu/explain.h"

#include <algorithm>
#include <sstream>

#include "kvk/api.h"

namespace kvk::cpu {

void explain_loop(explain::Notes& notes, int64_t pieces, int workers) {
  std::ostringstream json;
  json << "{\"step\": \"loop\", \"level\": \"" << cpu_level() << "\", \"pieces\": " << pieces
       << ", \"workers\": " << workers << "}";
  notes.steps.push_back(json.str());
}

void explain_attention(explain::Notes& notes, const PagedProblem& problem, const Plan& plan, int workers,
                       int64_t scratch_bytes) {
  int64_t stream_tiles = 0;
  int32_t most_splits = 0, most_heads = 0, most_rows = 0;
  for (const Tile& tile : plan.tiles) {
    stream_tiles += tile.stream;
    most_splits = std::max(most_splits, tile.num_splits);
    most_heads = std::max(most_heads, tile.head_end - tile.head_begin);
    most_rows = std::max(most_rows, tile.rows_per_head(problem.group));
  }
  const auto tiles = static_cast<int64_t>(plan.tiles.size());
  std::ostringstream json;
  json << "{\"step\": \"attention\", \"level\": \"" << cpu_level() << "\", \"stream_tiles\": " << stream_tiles
       << ", \"panel_tiles\": " << tiles - stream_tiles << ", \"items\": " << plan.items.size()
       << ", \"most_splits\": " << most_splits << ", \"stream_split_keys\": " << kStreamSplit
       << ", \"panel_split_keys\": " << kPanelSplit << ", \"heads_per_tile\": " << most_heads
       << ", \"rows_per_head\": " << most_rows << ", \"block_keys\": " << plan.block_keys
       << ", \"partial_rows\": " << plan.partial_rows << ", \"scratch_bytes\": " << scratch_bytes
       << ", \"workers\": " << workers << "}";
  notes.steps.push_back(json.str());
}

void explain_grid(explain::Notes& notes, const char* pass, int64_t tiles, int rows, int64_t pairs,
                  int64_t scratch_bytes, int workers) {
  std::ostringstream json;
  json << "{\"step\": \"grid\", \"level\": \"" << cpu_level() << "\", \"pass\": \"" << pass
       << "\", \"tiles\": " << tiles << ", \"rows_per_tile\": " << rows << ", \"block_columns\": " << kBlockKeys
       << ", \"visited_pairs\": " << pairs << ", \"scratch_bytes\": " << scratch_bytes << ", \"workers\": " << workers
       << "}";
  notes.steps.push_back(json.str());
}

void explain_chunks(explain::Notes& notes, int64_t items, int slices, int chunk_tokens, int64_t scratch_bytes,
                    int workers) {
  std::ostringstream json;
  json << "{\"step\": \"chunks\", \"level\": \"" << cpu_level() << "\", \"items\": " << items
       << ", \"slices\": " << slices << ", \"chunk_tokens\": " << chunk_tokens
       << ", \"scratch_bytes\": " << scratch_bytes << ", \"workers\": " << workers << "}";
  notes.steps.push_back(json.str());
}

}  // namespace kvk::cpu
