// Attention of many query rows per kv head over a request's pages (chunked prefill), FlashAttention-2's loop.
//
// FLOPs: 4 * Hq * D for each (query, key) seen; bytes: the keys a tile of 128 rows sees, once per tile, 2 * D * 2 each:
// 128 FLOPs a byte and more, so bound by mma.sync (about 62% of the tensor peak on sm_90).
// Tile: a block takes 128 query rows (64 beyond head dim 128) of one kv head, the heads of the group side by side, a warp
// 32 (16) of them, against 64 (32) keys at a time; less where a card's shared memory is small. Pipeline: two stages of K and V filled by cp.async, one block barrier a tile.
#pragma once

#include "kvk/device/dense_pages.cuh"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/device/ptx.h"
#include "kvk/device/score.cuh"
#include "kvk/device/smem.h"
#include "kvk/device/softmax.cuh"
#include "kvk/device/types.h"

namespace kvk::device {

static_assert(sizeof(KeyPlace) == PagedPrefillShape::kPlaceBytes);
static_assert(sizeof(PagedItem<0>) == PagedPrefillShape::kItemBytes);

// The query rows of a warp: scores, softmax state and output in mma fragments.
template <class Config>
class PrefillRows {
 public:
  using T = typename Config::T;
  using Place = typename Config::Pages::Place;
  static constexpr uint32_t kParts = Config::kParts;
  // A softmax step takes 32 keys: the scores of 64, beside 128 registers of output, would spill.
  static constexpr int kStep = Config::kKeys < 32 ? Config::kKeys : 32;
  static constexpr int kRowTiles = Config::kRowTiles, kKeyTiles = kStep / 8, kTilesV = Config::kDimV / 8;
  static_assert(Config::kKeys % kStep == 0);

  KVK_DEVICE PrefillRows(const PagedProblem& p, const PagedItem<kParts>& item, const T* queries, int warp)
      : p_(p), item_(item), score_(p), queries_(queries + warp * Config::kWarpRows * Config::kPitch),
        first_row_(warp * Config::kWarpRows) {}

  // One tile of keys, the first of them at position `first`; `places` holds their biases.
  KVK_DEVICE void attend(int32_t first, const T* k, const T* v, const Place* places) {
    KVK_NO_UNROLL
    for (int step = 0; step < Config::kKeys; step += kStep) {
      attend_step(first + step, k + step * Config::kPitch, v + step * Config::kPitchV, places + step);
    }
  }

  KVK_DEVICE void write() const {
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      KVK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        const float sum = quad_sum(state_[tile][half].sum);
        if (row >= item_.rows) continue;
        const int64_t token = item_.token + item_.token_of(p_, row), head = item_.head_of(p_, row);
        const RowEnd end =
            finish_row({state_[tile][half].max, sum}, p_.sinks ? p_.sinks + head * p_.sinks_stride : nullptr);
        T* out = static_cast<T*>(p_.out.data) + token * p_.out.token_stride + head * p_.out.head_stride;
        KVK_UNROLL
        for (int n = 0; n < kTilesV; ++n) {
          const int column = n * 8 + lane() % 4 * 2;
          if (column >= Config::kHeadDimV) continue;
          const float zero =
              end.factor == 0.0f ? 0.0f : 1.0f;  // a row without keys is 0 whatever its accumulators hold
          out[column] = from_float<T>(zero == 0.0f ? 0.0f : out_[tile][n][half * 2] * end.factor);
          out[column + 1] = from_float<T>(zero == 0.0f ? 0.0f : out_[tile][n][half * 2 + 1] * end.factor);
        }
        if (lane() % 4 == 0) p_.lse[token * p_.lse_token_stride + head * p_.lse_head_stride] = end.lse;
      }
    }
  }

 private:
  using Scores = float[kRowTiles][kKeyTiles][4];

  KVK_DEVICE void attend_step(int32_t first, const T* k, const T* v, const Place* places) {
    float s[kRowTiles][kKeyTiles][4] = {};
    uint32_t dense = 0;  // bit n: of this lane's column of K in key tile n
    if constexpr (Config::kQueryTerms == 3) {
      KVK_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) dense |= uint32_t{Config::Pages::is_dense(places[n * 8 + lane() / 4])} << n;
    }
    scores(k, dense, s);
    const bool hidden = mask(first, places, s);
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      reweigh(s[tile], tile, 0);
      reweigh(s[tile], tile, 1);
    }
    if (__any_sync(0xffffffffu, hidden) && !tile_is_finite<Config::kDimV, Config::kPitchV>(v, kStep, lane())) {
      accumulate_seen(s, v);
    } else {
      accumulate(s, v);
    }
  }

  // Not kept: a register more than it costs to ask again.
  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE int row_of(int tile, int half) const { return first_row_ + tile * 16 + half * 8 + lane() / 4; }

  KVK_DEVICE void scores(const T* k, [[maybe_unused]] uint32_t dense, Scores& s) const {
    KVK_NO_UNROLL
    for (int i = 0; i < Config::kDim / 16 * Config::kQueryTerms; ++i) {
      const int step = i / Config::kQueryTerms;
      const T* queries = queries_ + i % Config::kQueryTerms * (Config::kRows * Config::kPitch);
      uint32_t a[kRowTiles][4];
      KVK_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        ptx::ldmatrix(a[tile], queries + (tile * 16 + lane() % 16) * Config::kPitch + (step * 2 + lane() / 16) * 8);
      }
      KVK_UNROLL
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix(b, k + (n * 8 + lane() % 8 + lane() / 16 * 8) * Config::kPitch + (step * 2 + lane() / 8 % 2) * 8);
        if constexpr (Config::kQueryTerms == 3) {  // as in decode
          const bool plain = i % 3 == 2;
          KVK_UNROLL
          for (int j = 0; j < 4; ++j) b[j] = (dense >> (n + j / 2) & 1) == uint32_t{plain} ? b[j] : 0u;
        }
        KVK_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          ptx::mma_m16n8k16<T>(s[tile][n], a[tile], b[0], b[1]);
          ptx::mma_m16n8k16<T>(s[tile][n + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }

  // Turns q.k into scores and hides what a row may not see. Returns whether this lane hid a key that other rows may see.
  KVK_DEVICE bool mask(int32_t first, const Place* places, Scores& s) const {
    bool hidden = false;
    KVK_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      KVK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(tile, half);
        const RowMask<kParts> row_mask = row < item_.rows ? RowMask<kParts>(p_, item_, row) : RowMask<kParts>();
        KVK_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          KVK_UNROLL
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            const int column = n * 8 + lane() % 4 * 2 + i % 2;
            const int32_t key = first + column;
            const bool inside = key >= item_.begin && key < item_.end;
            const bool seen = inside && row_mask.sees(p_, key);
            hidden |= inside && !seen;
            const float bias = kParts & kKeyBias ? places[column].bias : 0.0f;
            s[tile][n][i] =
                seen ? score_(s[tile][n][i], row_mask.slope, static_cast<float>(row_mask.distance(key)), bias)
                     : -kInfinity;
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
        // An unseen key gets -0, which ex2 never gives (accumulate_seen).
        s[n][i] = s[n][i] == -kInfinity ? -0.0f : ptx::ex2(s[n][i] - base);
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

  KVK_DEVICE void accumulate(const Scores& s, const T* v) {
    KVK_UNROLL
    for (int step = 0; step < kStep / 16; ++step) {
      uint32_t a[kRowTiles][4];
      KVK_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const float (&left)[4] = s[tile][step * 2];
        const float (&right)[4] = s[tile][step * 2 + 1];
        a[tile][0] = pack2<T>(left[0], left[1]);
        a[tile][1] = pack2<T>(left[2], left[3]);
        a[tile][2] = pack2<T>(right[0], right[1]);
        a[tile][3] = pack2<T>(right[2], right[3]);
      }
      KVK_UNROLL
      for (int n = 0; n < kTilesV; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_trans(b, v + (step * 16 + lane() % 16) * Config::kPitchV + (n + lane() / 16) * 8);
        KVK_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          ptx::mma_m16n8k16<T>(out_[tile][n], a[tile], b[0], b[1]);
          ptx::mma_m16n8k16<T>(out_[tile][n + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }

  // The rare tile in which V holds NaN or infinities and some row does not see some key: 0 * NaN must not enter a row that
  // does not read that key. Weight (row, key) is in the quad lane of that key's column.
  KVK_DEVICE void accumulate_seen(const Scores& s, const T* v) {
    KVK_UNROLL  // registers have no addresses: the tile of keys is picked at compile time
        for (int n = 0; n < kKeyTiles; ++n) {
      KVK_NO_UNROLL
      for (int column = 0; column < 8; ++column) {
        const T* from = v + (n * 8 + column) * Config::kPitchV + lane() % 4 * 2;
        KVK_UNROLL
        for (int row = 0; row < kRowTiles * 2; ++row) {
          const int tile = row / 2, half = row % 2;
          const float p = __shfl_sync(0xffffffffu, column % 2 == 0 ? s[tile][n][half * 2] : s[tile][n][half * 2 + 1],
                                      (lane() & ~3) + column / 2);
          if (__float_as_uint(p) == 0x80000000u) continue;
          KVK_UNROLL
          for (int out = 0; out < kTilesV; ++out) {
            out_[tile][out][half * 2] += p * to_float(from[out * 8]);
            out_[tile][out][half * 2 + 1] += p * to_float(from[out * 8 + 1]);
          }
        }
      }
    }
  }

  const PagedProblem& p_;
  const PagedItem<kParts>& item_;
  Score<kParts> score_;
  const T* queries_;
  int first_row_;
  float out_[kRowTiles][kTilesV][4] = {};
  RowState state_[kRowTiles][2];
};

template <class Config>
class PrefillBlock {
 public:
  using T = typename Config::T;
  using Pages = typename Config::Pages;
  using Params = typename Pages::PrefillParams;
  using Place = typename Pages::Place;

  KVK_DEVICE PrefillBlock(const Params& params, SmemCarver carve)
      : params_(params), p_(params.problem), queries_(carve.take<T>(Config::kShape.query_elements(), 128)),
        tiles_(carve, params) {
    places_ = carve.take<Place>(Config::kStages * Config::kKeys);
    shared_item_ = carve.take<Item>(1);
  }

  // Block x is a row tile, counted over all requests; block y a kv head.
  KVK_DEVICE void run() {
    if (!find_tile(blockIdx.x)) return;
    item_.kv_head = blockIdx.y;
    item_.len = static_cast<int32_t>(p_.list.len(item_.request, item_.kv_head));
    item_.pages = p_.list.pages(item_.request, item_.kv_head);
    const int32_t first_token = item_.token_of(p_, 0), last_token = item_.token_of(p_, item_.rows - 1);
    const KeyRange keys = visible_keys(item_.len, int64_t{item_.len} - item_.num_tokens + first_token,
                                       last_token - first_token + 1, p_.causal, p_.window_left);
    item_.begin = static_cast<int32_t>(keys.begin);
    item_.end = static_cast<int32_t>(keys.end);
    // All threads know the item; from here on they read it from shared memory, which frees a dozen registers.
    if (threadIdx.x == 0) *shared_item_ = item_;
    __syncthreads();
    load_queries(*shared_item_);
    attend(*shared_item_);
  }

 private:
  // The request and the rows of row tile `slot`; tiles of later tokens, which see more keys, come first in a request. Every
  // warp works it out for itself. False past the last tile.
  KVK_DEVICE bool find_tile(int64_t slot) {
    const int lane = threadIdx.x % 32;
    for (int32_t first = 0; first < p_.num_requests; first += 32) {
      const int32_t request = first + lane;
      const int64_t tokens = request < p_.num_requests ? p_.num_request_tokens(request) : 0;
      const int64_t mine = is_streamed(tokens, p_.group) ? 0 : ceil_div<int64_t>(tokens * p_.group, Config::kRows);
      int64_t upto = mine;  // tiles of requests [first, request]
      KVK_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int64_t below = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += below;
      }
      const uint32_t at = __ballot_sync(0xffffffffu, slot < upto);
      if (at != 0) {
        const int owner = __ffs(static_cast<int>(at)) - 1;
        const int64_t tiles = __shfl_sync(0xffffffffu, mine, owner);
        const int64_t tile = __shfl_sync(0xffffffffu, upto, owner) - 1 - slot;
        item_.request = first + owner;
        item_.num_tokens = static_cast<int32_t>(__shfl_sync(0xffffffffu, tokens, owner));
        item_.token = p_.first_token(item_.request);
        item_.first_row = static_cast<int32_t>(tile * Config::kRows);
        const int32_t rest = item_.num_tokens * p_.group - item_.first_row;
        item_.rows = tile + 1 < tiles ? Config::kRows : rest;
        return true;
      }
      slot -= __shfl_sync(0xffffffffu, upto, 31);
    }
    return false;
  }

  using Item = PagedItem<Config::kParts>;

  KVK_DEVICE void load_queries(const Item& item) {
    if constexpr (Config::kQueryTerms == 3) {
      return load_rotated_queries<Config, Config::kRows>(params_, item, queries_, tiles_.scratch());
    }
    constexpr int kChunks = Config::kDim / 8;
    for (int i = threadIdx.x; i < Config::kRows * kChunks; i += Config::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool valid = row < item.rows && chunk * 8 < Config::kHeadDim;
      const int64_t at = valid ? (item.token + item.token_of(p_, row)) * p_.q.token_stride +
                                     item.head_of(p_, row) * p_.q.head_stride + chunk * 8
                               : 0;
      ptx::cp_async<16>(queries_ + row * Config::kPitch + chunk * 8, static_cast<const T*>(p_.q.data) + at, valid);
    }
  }

  KVK_DEVICE void attend(const Item& item) {
    PrefillRows<Config> rows(p_, item, queries_, threadIdx.x / 32);
    // Tiles start at multiples of kKeys, so that a request's tiles are the same whichever rows see them.
    const int32_t start = item.begin / Config::kKeys * Config::kKeys;
    const int tiles = item.end > start ? ceil_div(item.end - start, Config::kKeys) : 0;
    find_places(item, 0, start);
    __syncthreads();
    tiles_.load(item, 0, start, places_);
    ptx::cp_async_commit();
    find_places(item, 1, start + Config::kKeys);
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % Config::kStages;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is in for all; the other, and its places, are free
      const int32_t first = start + tile * Config::kKeys;
      const Place* places = places_ + stage * Config::kKeys;
      if (tile + 1 < tiles) {
        tiles_.load(item, stage ^ 1, first + Config::kKeys, places_ + (stage ^ 1) * Config::kKeys);
      }
      ptx::cp_async_commit();
      tiles_.tile(item, stage, first, places);
      rows.attend(first, tiles_.k(stage), tiles_.v(stage), places);
      __syncthreads();  // all are done with this stage's places
      find_places(item, stage, start + (tile + 2) * Config::kKeys);
    }
    ptx::cp_async_wait<0>();  // the queries, where there was no tile
    rows.write();
  }

  KVK_DEVICE void find_places(const Item& item, int stage, int32_t first) {
    if (threadIdx.x < Config::kKeys)
      places_[stage * Config::kKeys + threadIdx.x] = Pages::place(params_, item, first + threadIdx.x);
  }

  const Params& params_;
  const PagedProblem& p_;
  PagedItem<Config::kParts> item_;
  T* queries_;
  typename Pages::template PrefillTiles<Config> tiles_;
  Place* places_;
  PagedItem<Config::kParts>* shared_item_;
};

template <class Config>
KVK_KERNEL(Config::kThreads, 1)
paged_prefill_kernel(const __grid_constant__ typename Config::Pages::PrefillParams params) {
  PrefillBlock<Config>(params, SmemCarver()).run();
}

// Rows of q that belong to no request, past qo_indptr's end, and those of requests without tokens have no block: 0 and -inf.
template <class T, int kHeadDimV>
KVK_KERNEL(128, 1)
clear_unowned_kernel(const __grid_constant__ PagedPrefillParams params) {
  const PagedProblem& p = params.problem;
  const int64_t heads = int64_t{p.num_kv_heads} * p.group, owned = p.first_token(p.num_requests);
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int64_t token = row / heads, head = row % heads;
  if (token < owned || token >= p.num_tokens) return;
  for (int d = threadIdx.x % 32; d < kHeadDimV; d += 32) {
    static_cast<T*>(p.out.data)[token * p.out.token_stride + head * p.out.head_stride + d] = from_float<T>(0.0f);
  }
  if (threadIdx.x % 32 == 0) p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -kInfinity;
}

}  // namespace kvk::device
