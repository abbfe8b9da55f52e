// Neighborhood attention on the CPU: its schedule, the same for all passes.
//
// A tile is a box of tokens of one dilation group, its columns the box that holds all their windows, and the words of
// `seen` say which of these each row sees. What a row sees is a run along each dimension, and both ends of the runs never
// decrease from row to row. So do the ends of the runs of queries that see a key: the gradient of keys and values walks
// over the same kind of boxes with the tables turned round.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "core/neighborhood_problem.h"
#include "core/neighborhood_tile.h"
#include "cpu/backend.h"
#include "cpu/grid.h"

namespace kvk::cpu {
namespace {

// What unpacking a column and its share of the softmax cost, in rows of the matrix products.
constexpr int64_t kColumnRows = 12;
constexpr int64_t kRowStep = 12;  // rows are padded to a register block, of the widest level

// Columns [begin[i], end[i]) along one dimension that row i sees.
struct Runs {
  std::vector<int32_t> begin, end;

  int64_t length() const { return static_cast<int64_t>(begin.size()); }
  // Columns of all tiles of `tile` rows together.
  int64_t visited(int64_t tile) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < length(); i += tile) {
      sum += end[static_cast<size_t>(std::min(i + tile, length()) - 1)] - begin[static_cast<size_t>(i)];
    }
    return sum;
  }
};

// The keys of every query, in a dilation group of `length` places.
Runs windows(const NeighborhoodAxis& axis, int64_t length) {
  Runs runs;
  const device::NeighborhoodRule rule = rule_of(axis);
  for (int32_t i = 0; i < length; ++i) {
    const device::NeighborhoodRun keys = rule.keys(i, static_cast<int32_t>(length));
    runs.begin.push_back(keys.begin);
    runs.end.push_back(keys.end);
  }
  return runs;
}

// The queries of every key.
Runs turned(const Runs& windows) {
  Runs runs;
  int32_t first = 0, last = 0;
  for (int32_t key = 0; key < windows.length(); ++key) {
    while (windows.end[static_cast<size_t>(first)] <= key) ++first;
    while (last < windows.length() && windows.begin[static_cast<size_t>(last)] <= key) ++last;
    runs.begin.push_back(first);
    runs.end.push_back(last);
  }
  return runs;
}

struct Plan3d {
  struct Place {
    std::array<int32_t, 3> group, origin;
  };
  // Groups of a dimension have one of two lengths, which differ by one.
  std::array<std::array<Runs, 2>, 3> runs;
  std::array<int64_t, 3> tile;
  std::vector<Place> places;  // tiles of one head of one batch
  int heads = 1, parts = 1;   // query heads of a tile, and tiles that share the rows of a kv head

  const Runs& of(int d, int64_t group, const NeighborhoodProblem& p) const {
    return runs[static_cast<size_t>(d)][group < p.extent[d] % p.axes[d].dilation ? 1 : 0];
  }
  int64_t tokens() const { return tile[0] * tile[1] * tile[2]; }

  Plan3d(const NeighborhoodProblem& p, bool rows_are_queries) {
    for (int d = 0; d < 3; ++d) {
      const int64_t length = p.extent[d] / p.axes[d].dilation;
      for (int i = 0; i < 2; ++i) {
        Runs keys = windows(p.axes[d], length + i);
        runs[static_cast<size_t>(d)][static_cast<size_t>(i)] = rows_are_queries ? std::move(keys) : turned(keys);
      }
    }
    choose(rows_are_queries ? p.group : 1);
    parts = rows_are_queries ? (p.group + heads - 1) / heads : 1;
    place(p);
  }

 private:
  void choose(int group) {
    std::array<TileSizes, 3> sizes;
    for (size_t d = 0; d < 3; ++d) {
      const Runs& r = runs[d][0];
      sizes[d] = tile_sizes(r.length(), [&](int64_t size) { return r.visited(size); });
    }
    const NeighborhoodTile chosen = choose_tile(sizes, {kGridTileTokens, kRowStep, kColumnRows}, group,
                                                [&](int64_t n) { return heads_per_tile(group, n); });
    tile = chosen.size;
    heads = chosen.heads;
  }

  void place(const NeighborhoodProblem& p) {
    std::array<int32_t, 3> g, o;
    const auto step = [&](int d) { return static_cast<int32_t>(tile[static_cast<size_t>(d)]); };
    for (g[0] = 0; g[0] < p.axes[0].dilation; ++g[0]) {
      for (g[1] = 0; g[1] < p.axes[1].dilation; ++g[1]) {
        for (g[2] = 0; g[2] < p.axes[2].dilation; ++g[2]) {
          for (o[0] = 0; o[0] < of(0, g[0], p).length(); o[0] += step(0)) {
            for (o[1] = 0; o[1] < of(1, g[1], p).length(); o[1] += step(1)) {
              for (o[2] = 0; o[2] < of(2, g[2], p).length(); o[2] += step(2)) places.push_back({g, o});
            }
          }
        }
      }
    }
  }
};

class NeighborhoodSchedule final : public GridSchedule {
 public:
  NeighborhoodSchedule(const NeighborhoodProblem& p, const Plan3d& plan, bool rows_are_queries)
      : p_(p), plan_(plan), rows_are_queries_(rows_are_queries) {}

  void begin(int64_t tile, GridTile& rows) override {
    const int64_t places = static_cast<int64_t>(plan_.places.size());
    place_ = &plan_.places[static_cast<size_t>(tile % places)];
    const int64_t part = tile / places % (int64_t{p_.num_kv_heads} * plan_.parts);
    batch_ = tile / places / (int64_t{p_.num_kv_heads} * plan_.parts);
    rows.kv_head = static_cast<int32_t>(part / plan_.parts);
    if (rows_are_queries_) {
      const int first = static_cast<int>(part % plan_.parts) * plan_.heads;
      rows.head_begin = rows.kv_head * p_.group + first;
      rows.num_heads = std::min(plan_.heads, p_.group - first);
      head_ = rows.kv_head;
      head_end_ = head_ + 1;
    } else {
      rows.head_begin = rows.kv_head;
      rows.num_heads = 1;
      head_ = rows.kv_head * p_.group;
      head_end_ = head_ + p_.group;
    }
    for (size_t d = 0; d < 3; ++d) {
      runs_[d] = &plan_.of(static_cast<int>(d), place_->group[d], p_);
      const int64_t n = std::min(plan_.tile[d], runs_[d]->length() - place_->origin[d]);
      num_rows_[d] = static_cast<int32_t>(n);
      begin_[d] = runs_[d]->begin[static_cast<size_t>(place_->origin[d])];
      end_[d] = runs_[d]->end[static_cast<size_t>(place_->origin[d] + n - 1)];
    }
    next_ = begin_;
    rows.tokens.clear();
    for (int32_t x = 0; x < num_rows_[0]; ++x) {
      for (int32_t y = 0; y < num_rows_[1]; ++y) {
        add(rows.tokens, {place_->origin[0] + x, place_->origin[1] + y, place_->origin[2]}, num_rows_[2]);
      }
    }
  }

  bool next(GridColumns& columns) override {
    if (next_[0] == end_[0]) {
      if (++head_ >= head_end_) return false;
      next_ = begin_;
    }
    columns.head = head_;
    columns.biased = false;
    columns.tokens.clear();
    num_runs_ = 0;
    while (next_[0] < end_[0] && columns.tokens.count < kGridColumns) {
      const int32_t n = std::min(end_[2] - next_[2], kGridColumns - columns.tokens.count);
      places_[num_runs_++] = next_;
      add(columns.tokens, next_, n);
      if ((next_[2] += n) < end_[2]) break;
      next_[2] = begin_[2];
      if (++next_[1] < end_[1]) continue;
      next_[1] = begin_[1];
      ++next_[0];
    }
    mask(columns);
    return true;
  }

 private:
  using Place = std::array<int32_t, 3>;

  template <int kMost>
  void add(GridTokens<kMost>& tokens, const Place& at, int64_t n) const {
    const auto x = [&](size_t d) { return at[d] * p_.axes[d].dilation + place_->group[d]; };
    tokens.add(batch_, x(0), x(1), x(2), p_.axes[2].dilation, n);
  }

  // What a row sees is what it sees along every dimension.
  void mask(GridColumns& columns) {
    const uint64_t all = ~uint64_t{0} >> (kGridColumns - columns.tokens.count);
    uint64_t common = all;
    for (size_t d = 0; d < 3; ++d) {
      for (int32_t i = 0; i < num_rows_[d]; ++i) {
        const auto row = static_cast<size_t>(place_->origin[d] + i);
        words_[d][i] = word(columns.tokens, d, runs_[d]->begin[row], runs_[d]->end[row]);
        common &= words_[d][i];
      }
    }
    columns.masked = common != all;
    if (!columns.masked) return;
    uint64_t* seen = columns.seen;
    for (int32_t x = 0; x < num_rows_[0]; ++x) {
      for (int32_t y = 0; y < num_rows_[1]; ++y) {
        const uint64_t both = words_[0][x] & words_[1][y];
        for (int32_t z = 0; z < num_rows_[2]; ++z) *seen++ = both & words_[2][z];
      }
    }
  }

  // The columns whose place along dimension d is in [begin, end).
  uint64_t word(const GridTokens<kGridColumns>& tokens, size_t d, int32_t begin, int32_t end) const {
    uint64_t bits = 0;
    for (int i = 0; i < num_runs_; ++i) {
      const GridRun& run = tokens.runs[i];
      const int32_t at = places_[i][d];
      if (d == 2) {
        bits |= (low_bits(std::min(end - at, run.count)) & ~low_bits(begin - at)) << run.begin;
      } else if (begin <= at && at < end) {
        bits |= low_bits(run.count) << run.begin;
      }
    }
    return bits;
  }

  const NeighborhoodProblem& p_;
  const Plan3d& plan_;
  const bool rows_are_queries_;
  const Plan3d::Place* place_ = nullptr;
  const Runs* runs_[3] = {};
  int64_t batch_ = 0;
  int32_t head_ = 0, head_end_ = 0, num_runs_ = 0;
  Place num_rows_ = {}, begin_ = {}, end_ = {}, next_ = {};  // the box of columns, and the next of them
  Place places_[kGridColumns];                               // of the first column of every run
  uint64_t words_[3][kGridTileTokens];
};

void run(GridPass pass, const NeighborhoodProblem& p, Threads& threads) {
  const bool rows_are_queries = pass != GridPass::key_gradient;
  const Plan3d plan(p, rows_are_queries);
  const int64_t tiles = p.batch * p.num_kv_heads * plan.parts * static_cast<int64_t>(plan.places.size());
  run_grid(
      pass, p, tiles, plan.heads * static_cast<int>(plan.tokens()),
      [&] { return std::make_unique<NeighborhoodSchedule>(p, plan, rows_are_queries); }, threads);
}

}  // namespace

void neighborhood_attention(const NeighborhoodProblem& p, Threads& threads) { run(GridPass::attention, p, threads); }

void neighborhood_attention_backward(const NeighborhoodProblem& p, Threads& threads) {
  run(GridPass::query_gradient, p, threads);
  run(GridPass::key_gradient, p, threads);
}

}  // namespace kvk::cpu
