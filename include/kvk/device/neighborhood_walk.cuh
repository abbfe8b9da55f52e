// Schedule: a box of tokens of one dilation group against the box that holds all their windows. Rows are queries, or, in the
// gradient of keys and values, keys, whose columns are the queries that see them.
//
// What a row sees it sees along every dimension: for each place of the rows along each one a word tells the columns of a tile
// that it sees, which a warp finds by a ballot, and a row sees what its three words have in common.
#pragma once

#include "kvk/device/neighborhood_params.h"
#include "kvk/device/score.cuh"
#include "kvk/device/smem.h"

namespace kvk::device {

template <class Config>
class Neighborhood::Walk {
 public:
  static constexpr bool kRowsAreKeys = Config::kRowsAreKeys;
  struct Row {
    uint32_t word = 0;  // bit j: it sees column j of the step
  };

  KVK_DEVICE Walk(const NeighborhoodParams& p, const GridOperands& operands, SmemCarver& carve)
      : p_(p), num_kv_heads_(operands.num_kv_heads), group_(operands.group), item_(*carve.take<Item>(1)),
        runs_(carve.take<NeighborhoodRun>(kSlots)), words_(carve.take<uint32_t>(2 * kSlots * kWords)) {}

  KVK_DEVICE bool begin() {
    int64_t block = blockIdx.x;
    Item item;
    int32_t box[3], group[3];
    int64_t place = block % p_.boxes;
    block /= p_.boxes;
    const int32_t part = static_cast<int32_t>(block % p_.parts);
    block /= p_.parts;
    item.kv_head = static_cast<int32_t>(block % num_kv_heads_);
    item.batch = static_cast<int32_t>(block / num_kv_heads_);
    const int32_t first = part * p_.heads, left = kRowsAreKeys ? 1 : group_ - first;
    item.heads = left < p_.heads ? left : p_.heads;
    item.head = kRowsAreKeys ? item.kv_head : item.kv_head * group_ + first;
    item.tokens = 1;
    item.columns = 1;
    KVK_UNROLL
    for (int d = 2; d >= 0; --d) {
      const NeighborhoodDimension& dim = p_.dims[d];
      box[d] = static_cast<int32_t>(place % dim.boxes);
      place /= dim.boxes;
      group[d] = static_cast<int32_t>(place % dim.dilation);
      place /= dim.dilation;
      const int32_t length = dim.length(group[d]), origin = box[d] * dim.tile, rest = length - origin;
      const int32_t count = rest < dim.tile ? rest : dim.tile;
      if (count <= 0) return false;  // groups of a dimension differ in length by one
      item.group[d] = group[d];
      item.origin[d] = origin;
      item.count[d] = count;
      item.begin[d] = columns_of(d, origin, length).begin;
      item.size[d] = columns_of(d, origin + count - 1, length).end - item.begin[d];
      item.tokens *= count;
      item.columns *= item.size[d];
    }
    if (threadIdx.x == 0) item_ = item;
    return true;
  }
  // What comes after the barrier that follows, before another one.
  KVK_DEVICE void prepare() const {
    const int32_t slots = item_.count[0] + item_.count[1] + item_.count[2];
    for (int32_t slot = threadIdx.x; slot < slots; slot += Config::kThreads) {
      const int d = dimension(item_, slot);
      const int32_t at = item_.origin[d] + slot - first_slot(item_, d);
      if constexpr (kRowsAreKeys) {
        runs_[slot] = {at, at + 1};
      } else {
        runs_[slot] = p_.dims[d].rule.keys(at, p_.dims[d].length(item_.group[d]));
      }
    }
  }

  KVK_DEVICE int rows() const { return item_.tokens * item_.heads; }
  KVK_DEVICE GridPlace row(int i) const {
    const int32_t token = i / item_.heads, head = item_.head + i % item_.heads;
    const int32_t z = token % item_.count[2], y = token / item_.count[2] % item_.count[1],
                  x = token / item_.count[2] / item_.count[1];
    GridPlace place = at(item_.origin[0] + x, item_.origin[1] + y, item_.origin[2] + z, head);
    place.sight = x | (first_slot(item_, 1) + y) << 8 | (first_slot(item_, 2) + z) << 16;
    return place;
  }

  KVK_DEVICE int32_t start() { return ceil_div(item_.columns, Config::kKeys) * (kRowsAreKeys ? group_ : 1); }
  KVK_DEVICE void next() {
    base_ += Config::kKeys;
    if (kRowsAreKeys && base_ >= item_.columns && head_ + 1 < group_) {
      base_ = 0;
      ++head_;
    }
  }

  KVK_DEVICE bool column(int i, GridPlace& place, float& bias) const {
    bias = 0.0f;
    if (i >= left()) return false;
    const Column c = column_at(base_ + i);
    place = at(c.x, c.y, c.z, kRowsAreKeys ? item_.kv_head * group_ + head_ : item_.kv_head);
    place.sight = 1;
    return true;
  }

  // Finds the words of the tile; all threads of the block.
  KVK_DEVICE void look(int stage) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t slots = item_.count[0] + item_.count[1] + item_.count[2];
    KVK_NO_UNROLL
    for (int word = 0; word < kWords; ++word) {
      const int32_t i = word * 32 + lane;
      const bool is_column = i < left() && i < Config::kKeys;
      NeighborhoodRun mine[3] = {};  // of this lane's column: the places of rows that it goes with, or its own place
      if (is_column) {
        const Column c = column_at(base_ + i);
        const int32_t places[3] = {c.x, c.y, c.z};
        KVK_UNROLL
        for (int d = 0; d < 3; ++d) {
          const NeighborhoodDimension& dim = p_.dims[d];
          mine[d] = kRowsAreKeys ? dim.rule.keys(places[d], dim.length(item_.group[d]))
                                 : NeighborhoodRun{places[d], places[d] + 1};
        }
      }
      KVK_NO_UNROLL
      for (int32_t slot = warp; slot < slots; slot += Config::kWarps) {
        const int d = dimension(item_, slot);
        const NeighborhoodRun run = runs_[slot], other = d == 0 ? mine[0] : d == 1 ? mine[1] : mine[2];
        // One of the two is a single place: whether the other holds it.
        const uint32_t seen = __ballot_sync(0xffffffffu, is_column && run.begin < other.end && other.begin < run.end);
        if (lane == 0) words_[(stage * kSlots + slot) * kWords + word] = seen;
      }
    }
  }
  KVK_DEVICE Row see(const GridPlace& row, int stage, int step) const {
    const uint32_t* words = words_ + stage * (kSlots * kWords) + step / 32;
    const uint32_t sight = row.sight;
    return {words[(sight & 255) * kWords] & words[(sight >> 8 & 255) * kWords] & words[(sight >> 16) * kWords]};
  }
  KVK_DEVICE static bool inside(int, const GridColumn& column) { return column.sight != kNoColumn; }
  KVK_DEVICE static bool sees(const Row& row, int i, const GridColumn&) { return row.word >> i % 32 & 1; }

  static constexpr int32_t kNoColumn = 0;

 private:
  static constexpr int kSlots = slots(Config::kRows), kWords = words(Config::kKeys);
  struct Item {
    int32_t batch, kv_head, head, heads;  // head: the first query head, or the kv head
    int32_t tokens, columns;
    int32_t group[3], origin[3], count[3];  // the box of rows: places of its group
    int32_t begin[3], size[3];              // that of columns
  };
  static_assert(sizeof(Item) <= kItemBytes && kSlots <= 256);
  struct Column {
    int32_t x, y, z;
  };

  KVK_DEVICE static int32_t first_slot(const Item& item, int d) {
    return d == 0 ? 0 : d == 1 ? item.count[0] : item.count[0] + item.count[1];
  }
  KVK_DEVICE static int dimension(const Item& item, int32_t slot) {
    return slot < item.count[0] ? 0 : slot < item.count[0] + item.count[1] ? 1 : 2;
  }
  KVK_DEVICE NeighborhoodRun columns_of(int d, int32_t row, int32_t length) const {
    return kRowsAreKeys ? p_.dims[d].rule.queries(row, length) : p_.dims[d].rule.keys(row, length);
  }
  KVK_DEVICE int32_t left() const { return item_.columns - base_; }
  KVK_DEVICE Column column_at(int32_t index) const {
    const int32_t line = index / item_.size[2];
    return {item_.begin[0] + line / item_.size[1], item_.begin[1] + line % item_.size[1],
            item_.begin[2] + index % item_.size[2]};
  }
  KVK_DEVICE GridPlace at(int32_t x, int32_t y, int32_t z, int32_t head) const {
    const NeighborhoodDimension(&dims)[3] = p_.dims;
    return {{item_.batch, x * dims[0].dilation + item_.group[0], y * dims[1].dilation + item_.group[1],
             z * dims[2].dilation + item_.group[2]},
            head,
            0};
  }

  const NeighborhoodParams& p_;
  const int32_t num_kv_heads_, group_;
  Item& item_;
  NeighborhoodRun* runs_;
  uint32_t* words_;
  int32_t head_ = 0, base_ = 0;  // the tile's first column
};

}  // namespace kvk::device
