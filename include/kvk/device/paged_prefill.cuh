// Attention of many query rows per kv head over a request's pages (chunked prefill), FlashAttention-2's loop.
//
// FLOPs: 4 * Hq * D for each (query, key) seen; bytes: the keys a tile of 128 rows sees, once per tile, 2 * D * 2 each:
// 128 FLOPs a byte and more, so bound by mma.sync (about 62% of the tensor peak on sm_90).
// Tile: a block takes 128 query rows (64 beyond head dim 128) of one kv head, the heads of the group side by side, a warp
// 32 (16) of them, against 64 (32) keys at a time; less where a card's shared memory is small. Pipeline: two stages of K and V filled by cp.async, one block barrier a tile.
#pragma once

#include "kvk/device/attention_rows.cuh"
#include "kvk/device/dense_pages.cuh"
#include "kvk/device/find_slot.cuh"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/device/smem.h"

namespace kvk::device {

static_assert(sizeof(KeyPlace) == PagedPrefillShape::kPlaceBytes);
static_assert(sizeof(PagedItem<0>) == PagedPrefillShape::kItemBytes);

// What AttentionRows asks about the rows and keys of a request.
template <class Config>
struct PagedView {
  static constexpr uint32_t kParts = Config::kParts;
  using T = typename Config::T;
  using Place = typename Config::Pages::Place;
  using Row = RowMask<kParts>;
  struct Key {
    int32_t at;
    const Place& place;
  };

  const PagedProblem& p;
  const PagedItem<kParts>& item;
  Score<kParts> scores;

  KVK_DEVICE PagedView(const PagedProblem& problem, const PagedItem<kParts>& work)
      : p(problem), item(work), scores(problem.softmax_scale, problem.logits_soft_cap) {}

  KVK_DEVICE int rows() const { return item.rows; }
  KVK_DEVICE Row row(int i, int) const { return Row(p, item, i); }
  KVK_DEVICE Key key(int32_t first, int column, const Place* places) const { return {first + column, places[column]}; }
  KVK_DEVICE bool inside(const Key& key) const { return key.at >= item.begin && key.at < item.end; }
  KVK_DEVICE bool sees(const Row& row, const Key& key) const { return row.sees(p, key.at); }
  KVK_DEVICE float score(float qk, const Row& row, const Key& key) const {
    const float bias = kParts & kKeyBias ? key.place.bias : 0.0f;
    return scores(qk, row.slope, static_cast<float>(row.distance(key.at)), bias);
  }
  KVK_DEVICE static bool is_dense(const Place& place) { return Config::Pages::is_dense(place); }
  KVK_DEVICE RowOutput<T> output(int row) const {
    const int64_t token = item.token + item.token_of(p, row), head = item.head_of(p, row);
    return {static_cast<T*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride,
            p.lse + token * p.lse_token_stride + head * p.lse_head_stride,
            p.sinks ? p.sinks + head * p.sinks_stride : nullptr};
  }
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
  // The request and the rows of row tile `slot`; tiles of later tokens, which see more keys, come first in a request. False
  // past the last tile.
  KVK_DEVICE bool find_tile(int64_t slot) {
    const auto tiles = [&](int32_t request) -> int64_t {
      const int64_t tokens = p_.num_request_tokens(request);
      return is_streamed(tokens, p_.group) ? 0 : ceil_div<int64_t>(tokens * p_.group, Config::kRows);
    };
    Slot found;
    if (!find_slot(slot, p_.num_requests, tiles, found)) return false;
    const int64_t tile = found.count - 1 - found.index;
    item_.request = found.owner;
    item_.num_tokens = static_cast<int32_t>(p_.num_request_tokens(found.owner));
    item_.token = p_.first_token(item_.request);
    item_.first_row = static_cast<int32_t>(tile * Config::kRows);
    const int32_t rest = item_.num_tokens * p_.group - item_.first_row;
    item_.rows = tile + 1 < found.count ? Config::kRows : rest;
    return true;
  }

  using Item = PagedItem<Config::kParts>;

  KVK_DEVICE void load_queries(const Item& item) {
    if constexpr (Config::kQueryTerms == 3) {
      return load_rotated_queries<Config, Config::kRows>(params_, item, queries_, tiles_.scratch());
    }
    copy_rows<Config::kHeadDim, Config::kDim, Config::kPitch, Config::kThreads>(
        queries_, p_.q.data, Config::kRows, [&](int row) {
          return row < item.rows ? (item.token + item.token_of(p_, row)) * p_.q.token_stride +
                                       item.head_of(p_, row) * p_.q.head_stride
                                 : kNoRow;
        });
  }

  // Tiles start at multiples of kKeys, so that a request's tiles are the same whichever rows see them.
  struct Tiles {
    PrefillBlock& block;
    const Item& item;
    AttentionRows<Config, PagedView<Config>>& rows;
    int32_t start;

    KVK_DEVICE int32_t first(int tile) const { return start + tile * Config::kKeys; }
    KVK_DEVICE Place* places(int stage) const { return block.places_ + stage * Config::kKeys; }
    KVK_DEVICE void find(int stage, int tile) {
      if (threadIdx.x < Config::kKeys) {
        places(stage)[threadIdx.x] = Pages::place(block.params_, item, first(tile) + threadIdx.x);
      }
    }
    KVK_DEVICE void load(int stage, int tile) { block.tiles_.load(item, stage, first(tile), places(stage)); }
    KVK_DEVICE void use(int stage, int tile) {
      block.tiles_.tile(item, stage, first(tile), places(stage));
      rows.attend(first(tile), block.tiles_.k(stage), block.tiles_.v(stage), places(stage));
    }
  };

  KVK_DEVICE void attend(const Item& item) {
    const PagedView<Config> view(p_, item);
    AttentionRows<Config, PagedView<Config>> rows(view, queries_, threadIdx.x / 32);
    const int32_t start = item.begin / Config::kKeys * Config::kKeys;
    Tiles tiles = {*this, item, rows, start};
    walk_tiles(tiles, item.end > start ? ceil_div(item.end - start, Config::kKeys) : 0);
    rows.write();
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

// Rows of q that belong to no request, past qo_indptr's end, and those of requests without tokens have no block: 0 and, where
// there is an lse, -inf.
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
  if (p.lse != nullptr && threadIdx.x % 32 == 0)
    p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -kInfinity;
}

}  // namespace kvk::device
