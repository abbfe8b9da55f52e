// Gradients of attention over ordinary tensors, from out and lse that the caller gives (csrc/cpu/engine/grid_gradient.h):
//
//   P = exp(scale QK' + bias - lse)   delta = rowsum(dO * O) - dlse   dS = P * (dO V' - delta)
//   dQ = scale dS K                   dK = scale dS' Q                dV = P' dO
//
// One class for two passes, each of which writes only what belongs to its rows, so that the bits are the same on every run: rows
// are queries and columns keys for dQ, the other way round for dK and dV.
//
// FLOPs for each pair that the tiles visit: 4 D + 2 Dv for dQ and 4 D + 4 Dv for dK and dV, seven products where a pass that
// scatters needs five (beyond head dim 128 eight: dK and dV have passes of their own); bytes as in the forward kernel, twice, for
// 64 rows: some 100 FLOPs a byte, bound by mma.sync.
// Tile: 64 rows of a block, 16 of each warp, whose two sums take up to 128 registers; 64 columns up to head dim 64, else 32.
// Pipeline: walk_tiles's two stages, filled by cp.async, two block barriers a tile.
#pragma once

#include "kvk/device/grid.cuh"
#include "kvk/device/grid_gradient_params.h"

namespace kvk::device {

// The rows of a warp: their gradients in mma fragments.
template <class Config>
class GradientRows {
 public:
  using T = typename Config::T;
  using Sight = GridSight<Config>;
  using Column = typename Config::Column;
  static constexpr int kStep = Config::kKeys < 32 ? Config::kKeys : 32, kColumnTiles = kStep / 8;
  static constexpr bool kRowsAreKeys = Config::kRowsAreKeys;
  static constexpr bool kWithA = (Config::kGrads & kGradA) != 0, kWithB = (Config::kGrads & kGradB) != 0;

  KVK_DEVICE GradientRows(const Sight& sight, const T* a, const T* b, int warp)
      : sight_(sight), a_(a + warp * 16 * Config::kPitch), b_(b + warp * 16 * Config::kPitchV), first_row_(warp * 16) {
    if constexpr (!kRowsAreKeys) {
      KVK_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (row_of(half) >= sight_.rows()) continue;
        const float* state =
            GridPlaces<Config>::template element<float>(sight_.params.state, sight_.places.row(row_of(half)));
        lse_[half] = state[0];
        delta_[half] = state[1];
      }
    }
  }

  KVK_DEVICE void step(const T* a, const T* b, const Column* columns) {
    if (first_row_ >= sight_.rows()) return;
    KVK_NO_UNROLL
    for (int at = 0; at < Config::kKeys; at += kStep) {
      const T *column_a = a + at * Config::kPitch, *column_b = b + at * Config::kPitchV;
      float p[1][kColumnTiles][4] = {}, ds[1][kColumnTiles][4] = {};
      add_products<Config::kDim, Config::kPitch>(a_, column_a, p);
      if constexpr (kWithA) add_products<Config::kDimV, Config::kPitchV>(b_, column_b, ds);
      const bool hidden = differentiate(at, columns + at, p[0], ds[0]);
      if constexpr (kWithA) add_weighted<Config::kPitch>(ds, column_a, hidden, grad_a_);
      if constexpr (kWithB) add_weighted<Config::kPitchV>(p, column_b, hidden, grad_b_);
    }
  }

  KVK_DEVICE void write() const {
    if constexpr (kWithA) {
      write<Config::kHeadDim>(sight_.params.grad_a, grad_a_[0], sight_.params.operands.softmax_scale);
    }
    if constexpr (kWithB) write<Config::kHeadDimV>(sight_.params.grad_b, grad_b_[0], 1.0f);
  }

 private:
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE int row_of(int half) const { return first_row_ + half * 8 + lane() / 4; }

  // q.k to P, and dO.v in ds to dS; both kUnseen where a row does not see a column. Returns whether there is such a place
  // among the columns that there are.
  KVK_DEVICE bool differentiate(int at, const Column* columns, float (&p)[kColumnTiles][4],
                                float (&ds)[kColumnTiles][4]) const {
    bool hidden = false;
    KVK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const typename Sight::Row row =
          row_of(half) < sight_.rows() ? sight_.row(row_of(half), at) : typename Sight::Row();
      KVK_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        KVK_UNROLL
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const typename Sight::Key key = sight_.key(at, n * 8 + lane() % 4 * 2 + i % 2, columns);
          const bool inside = sight_.inside(key);
          float lse = lse_[half], delta = delta_[half];
          if constexpr (kRowsAreKeys) {
            lse = key.place.lse;
            delta = key.place.delta;
          }
          float s = sight_.score(p[n][i], row, key);
          // A bias of -inf hides a column too; and a query that saw nothing is seen by nobody.
          const bool seen = inside && sight_.sees(row, key) && s != -kInfinity && lse != kInfinity;
          hidden |= inside && !seen;
          s -= lse;
          if (s > kMostExponent) s = kMostExponent;  // an lse that is the keys' own keeps it at 0 or below
          const float weight = ptx::ex2(s);
          p[n][i] = seen ? weight : kUnseen;
          ds[n][i] = seen ? weight * (ds[n][i] - delta) + 0.0f : kUnseen;  // + 0: -0 is another thing
        }
      }
    }
    return hidden;
  }

  template <int kUsed, int kTiles>
  KVK_DEVICE void write(const GridView& view, const float (&grad)[kTiles][4], float factor) const {
    KVK_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (row_of(half) >= sight_.rows()) continue;
      T* to = GridPlaces<Config>::template element<T>(view, sight_.places.row(row_of(half)));
      KVK_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const int column = n * 8 + lane() % 4 * 2;
        if (column >= kUsed) continue;
        store_words<1>(to + column, {{pack2<T>(grad[n][half * 2] * factor, grad[n][half * 2 + 1] * factor)}});
      }
    }
  }

  static constexpr float kMostExponent = 127.0f;

  const Sight& sight_;
  const T *a_, *b_;
  int first_row_;
  float lse_[2] = {}, delta_[2] = {};  // of queries that are rows
  float grad_a_[1][kWithA ? Config::kDim / 8 : 1][4] = {}, grad_b_[1][kWithB ? Config::kDimV / 8 : 1][4] = {};
};

template <class Config>
class GridGradient {
 public:
  using T = typename Config::T;
  using Params = typename Config::Params;
  using Column = typename Config::Column;

  KVK_DEVICE GridGradient(const Params& params, SmemCarver carve)
      : params_(params), row_a_(carve.take<T>(size_t(Config::kRows) * Config::kPitch, 128)),
        row_b_(carve.take<T>(size_t(Config::kRows) * Config::kPitchV)), a_(carve.take<T>(Config::kStages * kTileA)),
        b_(carve.take<T>(Config::kStages * kTileB)), places_(params, carve) {}

  KVK_DEVICE void run() {
    if (!places_.begin()) return;
    places_.template load_rows<Config::kHeadDim, Config::kDim, Config::kPitch>(row_a_, params_.operands.row_a);
    if constexpr (Config::kGrads & kGradA) {
      places_.template load_rows<Config::kHeadDimV, Config::kDimV, Config::kPitchV>(row_b_, params_.row_b);
    }
    GridSight<Config> sight(places_, params_);
    GradientRows<Config> rows(sight, row_a_, row_b_, threadIdx.x / 32);
    Tiles tiles = {*this, sight, rows};
    walk_tiles(tiles, places_.start());
    rows.write();
  }

 private:
  static constexpr size_t kTileA = size_t(Config::kKeys) * Config::kPitch,
                          kTileB = size_t(Config::kKeys) * Config::kPitchV;

  struct Tiles {
    GridGradient& block;
    GridSight<Config>& sight;
    GradientRows<Config>& rows;

    KVK_DEVICE T* a(int stage) const { return block.a_ + stage * kTileA; }
    KVK_DEVICE T* b(int stage) const { return block.b_ + stage * kTileB; }
    KVK_DEVICE void find(int stage, int tile) {
      block.places_.find(stage, tile, [&](Column& column, bool found, const GridPlace& place) {
        if constexpr (Config::kRowsAreKeys) {
          const float* state = GridPlaces<Config>::template element<float>(block.params_.state, place);
          column.lse = found ? state[0] : kInfinity;
          column.delta = found ? state[1] : 0.0f;
        }
      });
    }
    KVK_DEVICE void load(int stage, int) { block.places_.load_columns(a(stage), b(stage), stage); }
    KVK_DEVICE void use(int stage, int) {
      sight.stage = stage;
      rows.step(a(stage), b(stage), block.places_.columns(stage));
    }
  };

  const Params& params_;
  T *row_a_, *row_b_, *a_, *b_;
  GridPlaces<Config> places_;
};

template <class Config>
KVK_KERNEL(Config::kThreads, 1)
grid_gradient_kernel(const __grid_constant__ typename Config::Params params) {
  GridGradient<Config>(params, SmemCarver()).run();
}

// A warp a query and head.
template <class T>
KVK_KERNEL(128, 1)
grid_state_kernel(const __grid_constant__ GridStateParams p) {
  int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  GridPlace place = {};
  place.head = static_cast<int32_t>(row % p.num_heads);
  row /= p.num_heads;
  KVK_UNROLL
  for (int d = kGridDims - 1; d >= 0; --d) {
    place.at[d] = static_cast<int32_t>(row % p.extent[d]);
    row /= p.extent[d];
  }
  if (row > 0) return;
  const auto offset = [&](const GridView& view) { return view.offset(place.at) + place.head * view.head_stride; };
  const T* out = static_cast<const T*>(p.out.data) + offset(p.out);
  const T* grad = static_cast<const T*>(p.grad_out.data) + offset(p.grad_out);
  const int lane = threadIdx.x % 32;
  float delta = 0.0f;
  if (lane * 8 < p.head_dim_v) {
    float x[8], y[8];
    unpack<T>(load_words<4>(out + lane * 8), x);
    unpack<T>(load_words<4>(grad + lane * 8), y);
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) delta += x[i] * y[i];
  }
  KVK_UNROLL
  for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (lane != 0) return;
  const float lse = static_cast<const float*>(p.lse.data)[offset(p.lse)];
  float* state = static_cast<float*>(p.state.data) + offset(p.state);
  state[0] = lse == -kInfinity ? kInfinity : lse * kLog2e;
  state[1] = delta - static_cast<const float*>(p.grad_lse.data)[offset(p.grad_lse)];
}

}  // namespace kvk::device
