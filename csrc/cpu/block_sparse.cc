// Block-sparse attention on the CPU: the schedules of its three passes.
//
// Forward and dQ: a tile is one query block and query heads that share a pattern. dK and dV: a tile is one key block of a kv
// head, its columns the query blocks that visit it, found in the transposed pattern.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/backend.h"
#include "cpu/packed.h"

namespace kvk::cpu {
namespace {

// Query blocks as rows, their entries' keys as columns.
class QuerySchedule final : public GridSchedule {
 public:
  QuerySchedule(const BlockSparseProblem& p, const TileList& tiles, int heads, int head_parts)
      : p_(p), tiles_(tiles), heads_(heads), head_parts_(head_parts) {}

  void begin(int64_t tile, GridTile& rows) override {
    const TileList::Place at = tiles_.place(tile);
    sequence_ = at.sequence;
    rows.kv_head = static_cast<int32_t>(at.part / head_parts_);
    const int32_t first = static_cast<int32_t>(at.part % head_parts_) * heads_;
    rows.head_begin = rows.kv_head * p_.group + first;
    rows.num_heads = std::min(heads_, p_.group - first);
    kv_head_ = rows.kv_head;
    head_ = rows.head_begin;
    const int64_t len = p_.queries.len(sequence_), q0 = at.block * p_.pattern.block_q;
    const int64_t n = std::min(p_.pattern.block_q, len - q0);
    rows.tokens.clear();
    rows.tokens.add(0, 0, 0, p_.queries.begin(sequence_) + q0, 1, n);
    num_rows_ = n;
    num_keys_ = p_.keys.len(sequence_);
    key_begin_ = p_.keys.begin(sequence_);
    // Row t sees keys up to limit_ + t.
    limit_ = p_.causal ? q0 + num_keys_ - len : std::numeric_limits<int64_t>::max() / 2;
    entry_ = *p_.row_ptr(sequence_, head_, at.block);
    end_ = *p_.row_ptr(sequence_, head_, at.block + 1);
    offset_ = 0;
  }

  bool next(GridColumns& columns) override {
    columns.head = kv_head_;
    columns.biased = p_.pattern.entry_bias.has_value();
    Filler to(columns);
    const int64_t bound = std::min(num_keys_, limit_ + num_rows_);  // keys that the last row sees
    for (; entry_ < end_ && !to.full(); ++entry_, offset_ = 0) {
      const int64_t first = p_.col(sequence_, head_, entry_) * p_.pattern.block_k;
      const int64_t n = std::min(p_.pattern.block_k, bound - first) - offset_;
      if (n <= 0) continue;
      const float bias = columns.biased ? p_.bias(sequence_, head_, entry_) : 0.0f;
      const int64_t added = to.add(key_begin_ + first + offset_, n, bias);
      offset_ += added;
      if (added < n) break;  // the rest belongs to the next columns
    }
    if (to.empty()) return false;
    if (p_.causal) hide_later_keys(columns, key_begin_, limit_, num_rows_);
    return true;
  }

 private:
  const BlockSparseProblem& p_;
  const TileList& tiles_;
  const int heads_, head_parts_;
  int32_t kv_head_ = 0;
  int64_t sequence_ = 0, head_ = 0, num_rows_ = 0, num_keys_ = 0, key_begin_ = 0, limit_ = 0;
  int64_t entry_ = 0, end_ = 0, offset_ = 0;  // the next key: `offset_` into the block of `entry_`
};

// For every key block of one pattern the entries that name it, in the order of their rows: a counting sort.
class Transpose {
 public:
  struct Entry {
    int32_t row, entry;
  };

  Transpose(const BlockSparseProblem& p, int64_t b, int64_t h, int64_t num_columns)
      : starts_(static_cast<size_t>(num_columns) + 1) {
    const int64_t rows = p.pattern.row_ptr.shape[2] - 1;
    const int64_t first = *p.row_ptr(b, h, 0), last = *p.row_ptr(b, h, rows);
    for (int64_t e = first; e < last; ++e) ++starts_[static_cast<size_t>(p.col(b, h, e)) + 1];
    for (size_t n = 1; n < starts_.size(); ++n) starts_[n] += starts_[n - 1];
    entries_.resize(static_cast<size_t>(last - first));
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t e = *p.row_ptr(b, h, m); e < *p.row_ptr(b, h, m + 1); ++e) {
        entries_[static_cast<size_t>(next[static_cast<size_t>(p.col(b, h, e))]++)] = {static_cast<int32_t>(m),
                                                                                      static_cast<int32_t>(e)};
      }
    }
  }
  const Entry* begin(int64_t column) const { return entries_.data() + starts_[static_cast<size_t>(column)]; }
  const Entry* end(int64_t column) const { return entries_.data() + starts_[static_cast<size_t>(column) + 1]; }

 private:
  std::vector<int64_t> starts_;
  std::vector<Entry> entries_;
};

// Key blocks as rows, the queries of the entries that name them as columns, one query head after another.
class KeySchedule final : public GridSchedule {
 public:
  KeySchedule(const BlockSparseProblem& p, const TileList& tiles, const std::vector<Transpose>& transposes)
      : p_(p), tiles_(tiles), transposes_(transposes) {}

  void begin(int64_t tile, GridTile& rows) override {
    const TileList::Place at = tiles_.place(tile);
    sequence_ = at.sequence;
    block_ = at.block;
    rows.kv_head = static_cast<int32_t>(at.part);
    rows.head_begin = rows.kv_head;
    rows.num_heads = 1;
    const int64_t num_keys = p_.keys.len(sequence_), k0 = block_ * p_.pattern.block_k;
    num_rows_ = std::min(p_.pattern.block_k, num_keys - k0);
    rows.tokens.clear();
    rows.tokens.add(0, 0, 0, p_.keys.begin(sequence_) + k0, 1, num_rows_);
    num_queries_ = p_.queries.len(sequence_);
    query_begin_ = p_.queries.begin(sequence_);
    // Row t, a key, is seen by queries from limit_ + t on.
    limit_ = p_.causal ? k0 - num_keys + num_queries_ : std::numeric_limits<int64_t>::min() / 2;
    head_ = int64_t{rows.kv_head} * p_.group;
    head_end_ = head_ + p_.group;
    rewind();
  }

  bool next(GridColumns& columns) override {
    columns.biased = p_.pattern.entry_bias.has_value();
    for (; head_ < head_end_; ++head_, rewind()) {
      columns.head = static_cast<int32_t>(head_);
      Filler to(columns);
      for (; entry_ != end_ && !to.full(); ++entry_, offset_ = 0) {
        const int64_t begin =
            std::max(entry_->row * p_.pattern.block_q, limit_);  // earlier queries see none of the keys
        const int64_t n = std::min((entry_->row + 1) * p_.pattern.block_q, num_queries_) - begin - offset_;
        if (n <= 0) continue;
        const float bias = columns.biased ? p_.bias(sequence_, head_, entry_->entry) : 0.0f;
        const int64_t added = to.add(query_begin_ + begin + offset_, n, bias);
        offset_ += added;
        if (added < n) break;
      }
      if (to.empty()) continue;
      if (p_.causal) mask(columns);
      return true;
    }
    return false;
  }

 private:
  void rewind() {
    if (head_ == head_end_) return;
    const int64_t b = p_.pattern_batches() > 1 ? sequence_ : 0, h = p_.pattern_heads() > 1 ? head_ : 0;
    const Transpose& transpose = transposes_[static_cast<size_t>(b * p_.pattern_heads() + h)];
    entry_ = transpose.begin(block_);
    end_ = transpose.end(block_);
    offset_ = 0;
  }

  void mask(GridColumns& columns) const {
    const GridTokens<kGridColumns>& tokens = columns.tokens;
    int64_t first = num_queries_;
    for (int i = 0; i < tokens.num_runs; ++i) first = std::min(first, query(tokens.runs[i]));
    columns.masked = first < limit_ + num_rows_ - 1;
    if (!columns.masked) return;
    std::fill_n(columns.seen, num_rows_, 0);
    for (int i = 0; i < tokens.num_runs; ++i) {
      const GridRun& run = tokens.runs[i];
      for (int64_t t = 0; t < num_rows_; ++t) {
        const int64_t unseen = limit_ + t - query(run);
        columns.seen[t] |= (low_bits(run.count) & ~low_bits(unseen)) << run.begin;
      }
    }
  }
  int64_t query(const GridRun& run) const { return run.at[kGridDims - 1] - query_begin_; }

  const BlockSparseProblem& p_;
  const TileList& tiles_;
  const std::vector<Transpose>& transposes_;
  int64_t sequence_ = 0, block_ = 0, num_rows_ = 0, num_queries_ = 0, query_begin_ = 0, limit_ = 0;
  int64_t head_ = 0, head_end_ = 0, offset_ = 0;
  const Transpose::Entry *entry_ = nullptr, *end_ = nullptr;
};

void run_queries(GridPass pass, const BlockSparseProblem& p, Threads& threads) {
  const int heads = p.pattern_heads() > 1 ? 1 : heads_per_tile(p.group, p.pattern.block_q);
  const int parts = (p.group + heads - 1) / heads;
  const TileList tiles(p.queries, p.pattern.block_q, int64_t{p.num_kv_heads} * parts);
  run_grid(
      pass, p, tiles.count(), heads * static_cast<int>(p.pattern.block_q),
      [&] { return std::make_unique<QuerySchedule>(p, tiles, heads, parts); }, threads);
}

}  // namespace

void block_sparse_attention(const BlockSparseProblem& p, Threads& threads) {
  run_queries(GridPass::attention, p, threads);
  clear_unowned_queries(p, p.queries);
}

void block_sparse_attention_backward(const BlockSparseProblem& p, Threads& threads) {
  run_queries(GridPass::query_gradient, p, threads);
  const TileList tiles(p.keys, p.pattern.block_k, p.num_kv_heads);
  int64_t columns = 0;
  for (int64_t b = 0; b < p.keys.count; ++b) columns = std::max(columns, blocks(p.keys.len(b), p.pattern.block_k));
  std::vector<Transpose> transposes;
  for (int64_t b = 0; b < p.pattern_batches(); ++b) {
    for (int64_t h = 0; h < p.pattern_heads(); ++h) transposes.emplace_back(p, b, h, columns);
  }
  run_grid(
      GridPass::key_gradient, p, tiles.count(), static_cast<int>(p.pattern.block_k),
      [&] { return std::make_unique<KeySchedule>(p, tiles, transposes); }, threads);
  clear_rows(p, p.dq, p.queries.end(p.queries.count - 1), p.queries.total, p.num_heads(), p.head_dim);
  const int64_t unowned = p.keys.end(p.keys.count - 1);
  clear_rows(p, p.dk, unowned, p.keys.total, p.num_kv_heads, p.head_dim);
  clear_rows(p, p.dv, unowned, p.keys.total, p.num_kv_heads, p.head_dim_v);
}

}  // namespace kvk::cpu
