// Schedule: a block's way through the blocks that a CSR pattern names. Rows are the queries of one query block and of the heads
// that share its pattern, or, in the gradient of keys and values, the keys of one key block; columns come list entry after
// list entry, there one query head after another.
#pragma once

#include "kvk/device/block_sparse_params.h"
#include "kvk/device/find_slot.cuh"
#include "kvk/device/score.cuh"
#include "kvk/device/smem.h"

namespace kvk::device {

template <class Config>
class BlockSparse::Walk {
 public:
  static constexpr bool kRowsAreKeys = Config::kRowsAreKeys;
  // A column's sight is at most that of a row that sees it: positions of keys against the last one a query sees, or the
  // other way round with a minus.
  struct Row {
    int32_t sight = kSeesNone;
  };

  KVK_DEVICE Walk(const BlockSparseParams& p, const GridOperands& operands, SmemCarver& carve)
      : p_(p), group_(operands.group), item_(*carve.take<Item>(1)) {}

  // Finds this block's rows; false: it has none. The item is there for all after the next barrier.
  KVK_DEVICE bool begin() {
    const PackedSequences& rows = kRowsAreKeys ? p_.keys : p_.queries;
    const int32_t size = kRowsAreKeys ? p_.block_k : p_.block_q, heads = kRowsAreKeys ? 1 : p_.heads;
    const int32_t tiles = ceil_div(size * heads, Config::kRows);
    Slot slot;
    const auto count = [&](int32_t b) { return int64_t{ceil_div(rows.len(b), size)} * tiles; };
    if (!find_slot(blockIdx.x, rows.count, count, slot)) return false;
    Item item;
    item.sequence = slot.owner;
    item.block = static_cast<int32_t>(slot.index / tiles);
    item.first_row = static_cast<int32_t>(slot.index % tiles) * Config::kRows;
    item.head = blockIdx.y * heads;
    item.kv_head = kRowsAreKeys ? item.head : item.head / group_;
    item.first_token = item.block * size;
    const int32_t rest = rows.len(slot.owner) - item.first_token;
    item.rows = (rest < size ? rest : size) * heads - item.first_row;
    if (item.rows > Config::kRows) item.rows = Config::kRows;
    if (item.rows <= 0) return false;
    item.query_begin = p_.queries.begin(slot.owner);
    item.num_queries = p_.queries.len(slot.owner);
    item.key_begin = p_.keys.begin(slot.owner);
    item.num_keys = p_.keys.len(slot.owner);
    if (threadIdx.x == 0) item_ = item;
    return true;
  }

  KVK_DEVICE void prepare() const {}

  KVK_DEVICE int rows() const { return item_.rows; }
  KVK_DEVICE GridPlace row(int i) const {
    const int32_t heads = kRowsAreKeys ? 1 : p_.heads, index = item_.first_row + i;
    const int32_t at = item_.first_token + index / heads, head = item_.head + index % heads;
    if constexpr (kRowsAreKeys) {
      return {{0, 0, 0, item_.key_begin + at}, head, -at};
    } else {
      return {{0, 0, 0, item_.query_begin + at}, head, p_.causal ? last_key(at) : kNoColumn - 1};
    }
  }

  // To the first tile of columns; how many there are in all.
  KVK_DEVICE int32_t start() {
    int32_t tiles = 0;
    const int32_t heads = kRowsAreKeys ? group_ : 1;
    for (int32_t h = heads - 1; h >= 0; --h) {
      open(h);
      tiles += static_cast<int32_t>(ceil_div<int64_t>(count_, Config::kKeys));
    }
    skip_empty();
    return tiles;
  }
  KVK_DEVICE void next() {
    base_ += Config::kKeys;
    skip_empty();
  }

  // Column i of the tile; false: there is none, or no row may see it.
  KVK_DEVICE bool column(int i, GridPlace& place, float& bias) const {
    const int64_t index = base_ + i;
    if (index >= count_) return false;
    const int32_t size = kRowsAreKeys ? p_.block_q : p_.block_k;
    int64_t entry = first_ + index / size;
    int32_t at = static_cast<int32_t>(index % size);
    const int32_t head = kRowsAreKeys ? item_.kv_head * group_ + head_ : item_.head;
    if constexpr (kRowsAreKeys) {
      const BlockEntry named = *p_.column_entries.at(item_.sequence, head, entry);
      entry = named.entry;
      at += named.row * size;
      if (at >= item_.num_queries || (p_.causal && last_key(at) < item_.first_token)) return false;
      place = {{0, 0, 0, item_.query_begin + at}, head, p_.causal ? -last_key(at) : kSeesNone + 1};
    } else {
      const int64_t key = int64_t{*p_.col_idx.at(item_.sequence, head, entry)} * size + at;
      if (key < 0 || key >= item_.num_keys) return false;
      at = static_cast<int32_t>(key);
      const int32_t last_row = item_.first_token + p_.block_q - 1;
      if (p_.causal && at > last_key(last_row)) return false;
      place = {{0, 0, 0, item_.key_begin + at}, item_.kv_head, at};
    }
    bias = 0.0f;
    if constexpr (Config::kParts & kKeyBias) bias = *p_.entry_bias.at(item_.sequence, head, entry);
    return bias != -kInfinity;
  }

  // What a tile's rows see of its columns is in the columns.
  KVK_DEVICE void look(int) const {}
  KVK_DEVICE Row see(const GridPlace& row, int, int) const { return {row.sight}; }
  KVK_DEVICE static bool inside(int, const GridColumn& column) { return column.sight != kNoColumn; }
  KVK_DEVICE static bool sees(const Row& row, int, const GridColumn& column) { return column.sight <= row.sight; }

  static constexpr int32_t kSeesNone = -0x7fffffff - 1, kNoColumn = 0x7fffffff;

 private:
  struct Item {
    int32_t sequence, kv_head, head, block;  // head: the first query head, or the kv head
    int32_t first_row, rows,
        first_token;  // rows [first_row, first_row + rows) of the block; its first token's position
    int32_t query_begin, num_queries, key_begin, num_keys;
  };
  static_assert(sizeof(Item) <= kItemBytes);

  KVK_DEVICE int32_t last_key(int32_t query) const { return query + item_.num_keys - item_.num_queries; }

  // The list of head h: entries from first_ on, count_ columns.
  KVK_DEVICE void open(int32_t h) {
    head_ = h;
    base_ = 0;
    const int32_t head = kRowsAreKeys ? item_.kv_head * group_ + h : item_.head;
    const bool named = item_.block < (kRowsAreKeys ? p_.block_columns : p_.block_rows);
    const SharedLists<int32_t>& starts = kRowsAreKeys ? p_.column_starts : p_.row_ptr;
    int64_t end = 0;
    first_ = 0;
    if (named) {
      first_ = *starts.at(item_.sequence, head, item_.block);
      end = *starts.at(item_.sequence, head, item_.block + 1);
    }
    if (first_ < 0) first_ = 0;
    if (end > p_.num_entries) end = p_.num_entries;
    count_ = end > first_ ? (end - first_) * (kRowsAreKeys ? p_.block_q : p_.block_k) : 0;
  }
  KVK_DEVICE void skip_empty() {
    if constexpr (kRowsAreKeys) {
      while (base_ >= count_ && head_ + 1 < group_) open(head_ + 1);
    }
  }

  const BlockSparseParams& p_;
  const int32_t group_;
  Item& item_;
  int32_t head_ = 0;
  int64_t base_ = 0, first_ = 0, count_ = 0;  // the tile's first column; the list's first entry, and its columns
};

}  // namespace kvk::device
