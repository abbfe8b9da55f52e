// Vertical-slash attention on the CPU: a schedule of runs of keys.
//
// For a block of 64 queries the keys of a slash are a band of 64 keys, those of a vertical one key: their union, as disjoint
// runs in ascending order, so that no key counts twice, and causality on top.
#include <algorithm>
#include <utility>
#include <vector>

#include "core/block_sparse_problem.h"
#include "cpu/backend.h"
#include "cpu/packed.h"

namespace kvk::cpu {
namespace {

constexpr int64_t kBlock = 64;  // queries of a tile, and keys of a band

// What one list names, in ascending order and once.
std::vector<int64_t> sorted(const Tensor& t, int64_t b, int64_t h) {
  std::vector<int64_t> list;
  for (int64_t i = 0; i < t.shape[2]; ++i) list.push_back(*shared_at<const int32_t>(t, b, h, i));
  std::sort(list.begin(), list.end());
  list.erase(std::unique(list.begin(), list.end()), list.end());
  return list;
}

struct Lists {
  std::vector<int64_t> vertical, slash;
};

class VerticalSlashSchedule final : public GridSchedule {
 public:
  VerticalSlashSchedule(const VerticalSlashProblem& p, const TileList& tiles, const std::vector<Lists>& lists,
                        int heads, int head_parts)
      : p_(p), tiles_(tiles), lists_(lists), heads_(heads), head_parts_(head_parts) {}

  void begin(int64_t tile, GridTile& rows) override {
    const TileList::Place at = tiles_.place(tile);
    rows.kv_head = static_cast<int32_t>(at.part / head_parts_);
    const int32_t first = static_cast<int32_t>(at.part % head_parts_) * heads_;
    rows.head_begin = rows.kv_head * p_.group + first;
    rows.num_heads = std::min(heads_, p_.group - first);
    kv_head_ = rows.kv_head;
    const int64_t len = p_.queries.len(at.sequence), num_keys = p_.keys.len(at.sequence), q0 = at.block * kBlock;
    num_rows_ = std::min(kBlock, len - q0);
    rows.tokens.clear();
    rows.tokens.add(0, 0, 0, p_.queries.begin(at.sequence) + q0, 1, num_rows_);
    key_begin_ = p_.keys.begin(at.sequence);
    limit_ = q0 + num_keys - len;  // the position of row 0
    gather(list(at.sequence, rows.head_begin), std::min(num_keys, limit_ + num_rows_));
    run_ = 0;
    offset_ = 0;
  }

  bool next(GridColumns& columns) override {
    columns.head = kv_head_;
    columns.biased = false;
    Filler to(columns);
    for (; run_ < runs_.size() && !to.full(); ++run_, offset_ = 0) {
      const auto [first, end] = runs_[run_];
      const int64_t n = end - first - offset_;
      const int64_t added = to.add(key_begin_ + first + offset_, n, 0.0f);
      offset_ += added;
      if (added < n) break;
    }
    if (to.empty()) return false;
    hide_later_keys(columns, key_begin_, limit_, num_rows_);
    return true;
  }

 private:
  const Lists& list(int64_t b, int64_t h) const {
    const int64_t heads = p_.vertical.shape[1];
    return lists_[static_cast<size_t>((p_.vertical.shape[0] > 1 ? b : 0) * heads + (heads > 1 ? h : 0))];
  }

  // Runs of keys before `bound`.
  void gather(const Lists& lists, int64_t bound) {
    runs_.clear();
    auto vertical = std::lower_bound(lists.vertical.begin(), lists.vertical.end(), 0);
    const auto first_slash = std::lower_bound(lists.slash.begin(), lists.slash.end(), 0);
    const auto add = [&](int64_t begin, int64_t end) {
      begin = std::max<int64_t>(begin, 0);
      end = std::min(end, bound);
      if (begin >= end) return;
      if (!runs_.empty() && begin <= runs_.back().second) {
        runs_.back().second = std::max(runs_.back().second, end);
      } else {
        runs_.emplace_back(begin, end);
      }
    };
    for (auto slash = lists.slash.end(); slash != first_slash;) {  // the farthest first: bands from left to right
      const int64_t begin = limit_ - *--slash;
      for (; vertical != lists.vertical.end() && *vertical < begin; ++vertical) add(*vertical, *vertical + 1);
      add(begin, begin + kBlock);
    }
    for (; vertical != lists.vertical.end() && *vertical < bound; ++vertical) add(*vertical, *vertical + 1);
  }

  const VerticalSlashProblem& p_;
  const TileList& tiles_;
  const std::vector<Lists>& lists_;
  const int heads_, head_parts_;
  int32_t kv_head_ = 0;
  int64_t num_rows_ = 0, key_begin_ = 0, limit_ = 0, offset_ = 0;
  size_t run_ = 0;
  std::vector<std::pair<int64_t, int64_t>> runs_;
};

}  // namespace

void vertical_slash_attention(const VerticalSlashProblem& p, Threads& threads) {
  std::vector<Lists> lists;
  for (int64_t b = 0; b < p.vertical.shape[0]; ++b) {
    for (int64_t h = 0; h < p.vertical.shape[1]; ++h)
      lists.push_back({sorted(p.vertical, b, h), sorted(p.slash, b, h)});
  }
  const int heads = p.vertical.shape[1] > 1 ? 1 : heads_per_tile(p.group, kBlock);
  const int parts = (p.group + heads - 1) / heads;
  const TileList tiles(p.queries, kBlock, int64_t{p.num_kv_heads} * parts);
  run_grid(
      GridPass::attention, p, tiles.count(), heads * static_cast<int>(kBlock),
      [&] { return std::make_unique<VerticalSlashSchedule>(p, tiles, lists, heads, parts); }, threads);
  clear_unowned_queries(p, p.queries);
}

}  // namespace kvk::cpu
