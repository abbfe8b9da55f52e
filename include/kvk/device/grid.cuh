// Attention over ordinary tensors: FlashAttention-2's loop over the columns that a schedule brings. Block-sparse and
// neighborhood attention are two of them.
//
// FLOPs: 2 * (D + Dv) for each pair of a row and a column that the tiles visit; bytes: the columns of a tile once, 2 * (D + Dv)
// each, for 128 rows: 128 FLOPs a byte and more, so bound by mma.sync as paged prefill is.
// Tile and pipeline are paged prefill's (paged_prefill_params.h, walk_tiles): 128 query rows (64 beyond head dim 128, and where
// a pattern has no more), the query heads of a kv head side by side where they see the same; 64 (32) columns at a time, wherever
// they lie. Rows and columns are found by a thread each, a tile ahead of its copies.
#pragma once

#include "kvk/device/attention_rows.cuh"
#include "kvk/device/block_sparse_walk.cuh"
#include "kvk/device/grid_params.h"
#include "kvk/device/neighborhood_walk.cuh"
#include "kvk/device/smem.h"

namespace kvk::device {

// Where the rows and columns of a block's tiles lie.
template <class Config>
class GridPlaces {
 public:
  using Column = typename Config::Column;
  using Walk = typename Config::Schedule::template Walk<Config>;

  KVK_DEVICE GridPlaces(const typename Config::Params& params, SmemCarver& carve)
      : operands_(params.operands), columns_(carve.take<Column>(Config::kStages * Config::kKeys)),
        rows_(carve.take<GridPlace>(Config::kRows)), walk_(params.schedule, params.operands, carve) {}

  // Finds the block's rows; false: it has none. All threads.
  KVK_DEVICE bool begin() {
    if (!walk_.begin()) return false;
    __syncthreads();  // the work is there for all
    walk_.prepare();
    num_rows_ = walk_.rows();
    for (int i = threadIdx.x; i < num_rows_; i += Config::kThreads) rows_[i] = walk_.row(i);
    __syncthreads();  // the rows are
    return true;
  }
  KVK_DEVICE int rows() const { return num_rows_; }
  KVK_DEVICE const GridPlace& row(int i) const { return rows_[i]; }
  KVK_DEVICE static int64_t offset(const GridView& view, const GridPlace& place) {
    return view.offset(place.at) + place.head * view.head_stride;
  }
  template <class T>
  KVK_DEVICE static T* element(const GridView& view, const GridPlace& place) {
    return static_cast<T*>(view.data) + offset(view, place);
  }

  KVK_DEVICE int32_t start() { return walk_.start(); }
  // The columns of the next tile. more(column, found, place): what else they have.
  template <class More>
  KVK_DEVICE void find(int stage, int tile, More&& more) {
    if (tile > 0) walk_.next();
    for (int i = threadIdx.x; i < Config::kKeys; i += Config::kThreads) {
      Column& column = columns_[stage * Config::kKeys + i];
      GridPlace place = {};
      float bias = 0.0f;
      const bool found = walk_.column(i, place, bias);
      column.a = found ? offset(operands_.column_a, place) : kNoRow;
      column.b = found ? offset(operands_.column_b, place) : kNoRow;
      column.bias = bias;
      column.sight = found ? place.sight : Walk::kNoColumn;
      more(column, found, place);
    }
    walk_.look(stage);
  }
  KVK_DEVICE const Column* columns(int stage) const { return columns_ + stage * Config::kKeys; }
  KVK_DEVICE const Walk& walk() const { return walk_; }

  template <int kUsed, int kPadded, int kPitch, class T>
  KVK_DEVICE void load_rows(T* to, const GridView& view) const {
    copy_rows<kUsed, kPadded, kPitch, Config::kThreads>(
        to, view.data, Config::kRows, [&](int i) { return i < num_rows_ ? offset(view, rows_[i]) : kNoRow; });
  }
  // Starts the copies of a tile of both tensors.
  template <class T>
  KVK_DEVICE void load_columns(T* a, T* b, int stage) const {
    const Column* columns = columns_ + stage * Config::kKeys;
    copy_rows<Config::kHeadDim, Config::kDim, Config::kPitch, Config::kThreads>(
        a, operands_.column_a.data, Config::kKeys, [&](int i) { return columns[i].a; });
    copy_rows<Config::kHeadDimV, Config::kDimV, Config::kPitchV, Config::kThreads>(
        b, operands_.column_b.data, Config::kKeys, [&](int i) { return columns[i].b; });
  }

 private:
  const GridOperands& operands_;
  Column* columns_;
  GridPlace* rows_;
  Walk walk_;
  int num_rows_ = 0;
};

// What AttentionRows and the rows of a gradient ask about rows and columns.
template <class Config>
struct GridSight {
  using T = typename Config::T;
  using Place = typename Config::Column;
  using Walk = typename Config::Schedule::template Walk<Config>;
  using Row = typename Walk::Row;
  struct Key {
    int index;  // within the tile
    const Place& place;
  };

  const GridPlaces<Config>& places;
  const typename Config::Params& params;
  Score<Config::kParts> scores;
  int stage = 0;  // of the tile at hand

  KVK_DEVICE GridSight(const GridPlaces<Config>& all, const typename Config::Params& p)
      : places(all), params(p), scores(p.operands.softmax_scale) {}

  KVK_DEVICE int rows() const { return places.rows(); }
  KVK_DEVICE Row row(int i, int step) const { return places.walk().see(places.row(i), stage, step); }
  KVK_DEVICE Key key(int32_t first, int column, const Place* columns) const {
    return {first + column, columns[column]};
  }
  KVK_DEVICE bool inside(const Key& key) const { return Walk::inside(key.index, key.place); }
  KVK_DEVICE bool sees(const Row& row, const Key& key) const { return Walk::sees(row, key.index, key.place); }
  KVK_DEVICE float score(float qk, const Row&, const Key& key) const {
    return scores(qk, 0.0f, 0.0f, Config::kParts & kKeyBias ? key.place.bias : 0.0f);
  }
  KVK_DEVICE RowOutput<T> output(int i) const {
    const GridPlace& place = places.row(i);
    return {GridPlaces<Config>::template element<T>(params.out, place),
            GridPlaces<Config>::template element<float>(params.lse, place), nullptr};
  }
};

template <class Config>
class GridAttention {
 public:
  using T = typename Config::T;
  using Params = typename Config::Params;

  KVK_DEVICE GridAttention(const Params& params, SmemCarver carve)
      : params_(params), queries_(carve.take<T>(Config::kShape.query_elements(), 128)),
        k_(carve.take<T>(Config::kStages * kTileK)), v_(carve.take<T>(Config::kStages * kTileV)),
        places_(params, carve) {}

  KVK_DEVICE void run() {
    if (!places_.begin()) return;
    places_.template load_rows<Config::kHeadDim, Config::kDim, Config::kPitch>(queries_, params_.operands.row_a);
    GridSight<Config> sight(places_, params_);
    AttentionRows<Config, GridSight<Config>> rows(sight, queries_, threadIdx.x / 32);
    Tiles tiles = {*this, sight, rows};
    walk_tiles(tiles, places_.start());
    rows.write();
  }

 private:
  static constexpr size_t kTileK = Config::kShape.k_elements(), kTileV = Config::kShape.v_elements();

  struct Tiles {
    GridAttention& block;
    GridSight<Config>& sight;
    AttentionRows<Config, GridSight<Config>>& rows;

    KVK_DEVICE T* k(int stage) const { return block.k_ + stage * kTileK; }
    KVK_DEVICE T* v(int stage) const { return block.v_ + stage * kTileV; }
    KVK_DEVICE void find(int stage, int tile) {
      block.places_.find(stage, tile, [](GridColumn&, bool, const GridPlace&) {});
    }
    KVK_DEVICE void load(int stage, int) { block.places_.load_columns(k(stage), v(stage), stage); }
    KVK_DEVICE void use(int stage, int) {
      sight.stage = stage;
      rows.attend(0, k(stage), v(stage), block.places_.columns(stage));
    }
  };

  const Params& params_;
  T *queries_, *k_, *v_;
  GridPlaces<Config> places_;
};

template <class Config>
KVK_KERNEL(Config::kThreads, 1)
grid_attention_kernel(const __grid_constant__ typename Config::Params params) {
  GridAttention<Config>(params, SmemCarver()).run();
}

}  // namespace kvk::device
