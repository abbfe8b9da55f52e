// The query rows of a warp against tiles of keys: scores, online softmax and output in mma fragments. Which keys a row sees,
// what becomes of a product and where a row's output goes is the view's, a struct with
//
//   rows()                       query rows of the block
//   Row                          what one of them sees; Row() sees nothing
//   row(i, step)                 that of row i, for the keys from `step` of the tile on
//   Key, key(first, column, places)  key `column` of a step whose first key is number `first`
//   inside(key)                  whether there is such a key at all
//   sees(row, key)               whether the row sees a key that there is
//   score(qk, row, key)          q.k to a score, times log2(e)
//   is_dense(place)              see page_format.h, where the rows are in three terms
//   output(row)                  RowOutput
#pragma once

#include "kvk/device/softmax.cuh"
#include "kvk/device/tile_products.cuh"

namespace kvk::device {

template <class T>
struct RowOutput {
  T* out;
  float* lse;
  const float* sink;  // null: none
};

template <class Config, class View>
class AttentionRows {
 public:
  using T = typename Config::T;
  using Place = typename View::Place;
  // A softmax step takes 32 keys: the scores of 64, beside 128 registers of output, would spill.
  static constexpr int kStep = Config::kKeys < 32 ? Config::kKeys : 32;
  static constexpr int kRowTiles = Config::kRowTiles, kKeyTiles = kStep / 8, kTilesV = Config::kDimV / 8;
  static_assert(Config::kKeys % kStep == 0);

  KVK_DEVICE AttentionRows(const View& view, const T* queries, int warp)
      : view_(view), queries_(queries + warp * Config::kWarpRows * Config::kPitch),
        first_row_(warp * Config::kWarpRows) {}

  // One tile of keys, the first of them number `first`.
  KVK_DEVICE void attend(int32_t first, const T* k, const T* v, const Place* places) {
    if (first_row_ >= view_.rows()) return;
    KVK_NO_UNROLL
    for (int step = 0; step < Config::kKeys; step += kStep) {
      attend_step(step, first + step, k + step * Config::kPitch, v + step * Config::kPitchV, places + step);
    }
  }

  KVK_DEVICE void write() const {
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      KVK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        const float sum = quad_sum(state_[tile][half].sum);
        if (row >= view_.rows()) continue;
        const RowOutput<T> to = view_.output(row);
        const RowEnd end = finish_row({state_[tile][half].max, sum}, to.sink);
        KVK_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          const int column = n * 8 + lane() % 4 * 2;
          if (column >= Config::kHeadDimV) continue;
          const float zero =
              end.factor == 0.0f ? 0.0f : 1.0f;  // a row without keys is 0 whatever its accumulators hold
          to.out[column] = from_float<T>(zero == 0.0f ? 0.0f : out_[tile][n][half * 2] * end.factor);
          to.out[column + 1] = from_float<T>(zero == 0.0f ? 0.0f : out_[tile][n][half * 2 + 1] * end.factor);
        }
        if (lane() % 4 == 0) *to.lse = end.lse;
      }
    }
  }

 private:
  using Scores = float[kRowTiles][kKeyTiles][4];

  KVK_DEVICE void attend_step(int step, int32_t first, const T* k, const T* v, const Place* places) {
    float s[kRowTiles][kKeyTiles][4] = {};
    scores(k, places, s);
    const bool hidden = mask(step, first, places, s);
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      reweigh(s[tile], tile, 0);
      reweigh(s[tile], tile, 1);
    }
    add_weighted<Config::kPitchV>(s, v, hidden, out_);
  }

  // Not kept: a register more than it costs to ask again.
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE int row_of(int tile, int half) const { return first_row_ + tile * 16 + half * 8 + lane() / 4; }

  KVK_DEVICE void scores(const T* k, [[maybe_unused]] const Place* places, Scores& s) const {
    if constexpr (Config::kQueryTerms == 3) {
      uint32_t dense = 0;  // bit n: of this lane's column of K in key tile n
      KVK_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) dense |= uint32_t{view_.is_dense(places[n * 8 + lane() / 4])} << n;
      add_products<Config::kDim, Config::kPitch, 3, Config::kRows * Config::kPitch>(
          queries_, k, s, [&](int i, int n, uint32_t (&b)[4]) {  // as in decode
            const bool plain = i % 3 == 2;
            KVK_UNROLL
            for (int j = 0; j < 4; ++j) b[j] = (dense >> (n + j / 2) & 1) == uint32_t{plain} ? b[j] : 0u;
          });
    } else {
      add_products<Config::kDim, Config::kPitch>(queries_, k, s);
    }
  }

  // Turns q.k into scores and hides what a row may not see. Returns whether this lane hid a key that other rows may see.
  KVK_DEVICE bool mask(int step, int32_t first, const Place* places, Scores& s) const {
    bool hidden = false;
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      KVK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int index = row_of(tile, half);
        const typename View::Row row = index < view_.rows() ? view_.row(index, step) : typename View::Row();
        KVK_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          KVK_UNROLL
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            const typename View::Key key = view_.key(first, n * 8 + lane() % 4 * 2 + i % 2, places);
            const bool inside = view_.inside(key);
            const bool seen = inside && view_.sees(row, key);
            hidden |= inside && !seen;
            s[tile][n][i] = seen ? view_.score(s[tile][n][i], row, key) : -kInfinity;
          }
        }
      }
    }
    return hidden;
  }

  // Scores to weights in place for one row of a row tile, and its part of the output rescaled.
  KVK_DEVICE void reweigh(float (&s)[kKeyTiles][4], int tile, int half) {
    RowState& state = state_[tile][half];
    float max = state.max;
    KVK_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) max = fmaxf(max, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    max = quad_max(max);
    const float base = softmax_base(max), factor = ptx::ex2(state.max - base);
    float sum = 0.0f;
    KVK_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      KVK_UNROLL
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        s[n][i] = s[n][i] == -kInfinity ? kUnseen : ptx::ex2(s[n][i] - base);
        sum += s[n][i];
      }
    }
    state = {max, state.sum * factor + sum};  // each lane sums its own columns until the end
    KVK_UNROLL
    for (int n = 0; n < kTilesV; ++n) {
      out_[tile][n][half * 2] *= factor;
      out_[tile][n][half * 2 + 1] *= factor;
    }
  }

  const View& view_;
  const T* queries_;
  int first_row_;
  float out_[kRowTiles][kTilesV][4] = {};
  RowState state_[kRowTiles][2];
};

// Tiles [0, count) in two stages, one on its way while the other is used; two block barriers a tile. All threads of a block,
// with a Tiles of
//   find(stage, tile)  works out the places of a tile's keys, in this order of tiles, also past the last one
//   load(stage, tile)  starts the copies
//   use(stage, tile)
template <class Tiles>
KVK_DEVICE void walk_tiles(Tiles& tiles, int count) {
  tiles.find(0, 0);
  __syncthreads();
  tiles.load(0, 0);
  ptx::cp_async_commit();
  tiles.find(1, 1);
  for (int tile = 0; tile < count; ++tile) {
    const int stage = tile % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is in for all; the other, and its places, are free
    if (tile + 1 < count) tiles.load(stage ^ 1, tile + 1);
    ptx::cp_async_commit();
    tiles.use(stage, tile);
    __syncthreads();  // all are done with this stage's places
    tiles.find(stage, tile + 2);
  }
  ptx::cp_async_wait<0>();  // the rows, where there was no tile
}

}  // namespace kvk::device
