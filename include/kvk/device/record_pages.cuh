// What formats of records have in common (kvk/device/page_format.h): where a key lies, and how the decode and prefill kernels get
// the keys they need next out of records and dense pages mixed, as the tag of a page reference says.
//
// Pipeline: records are copied raw by cp.async, stage by stage; a warp expands the 16 keys it needs next (in prefill: its part of
// the block's tile) to the element type, and the engine goes on as with dense pages. Dense keys are read when their tile is due,
// from L2 where they have been asked for. Rotated records: q is rotated at the start, and dense keys count with q as it is, so
// that neither is rounded twice; dense values are rotated on the way, and the output is rotated back after the kernel.
#pragma once

#include "kvk/device/hadamard.cuh"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/record_pages_params.h"

namespace kvk::device {

// Where one key lies, in a record or in a dense page.
struct RecordPlace {
  int64_t k = 0, v = 0;  // bytes from the pool's start to the record; of a dense page, elements to the key's row
  float bias = 0.0f;
  int32_t token = -1;    // in the record; -1: a dense page, or no key
  bool visible = false;  // a hidden key is not read: zeros stand in for it
};
static_assert(sizeof(RecordPlace) == kRecordPlaceBytes);

// Chunk `chunk` of the bytes [begin, begin + bytes) of `from`, from the multiple of 16 at or below begin on, if it holds any of
// them; zeros if not `valid`.
KVK_DEVICE void copy_chunk(uint8_t* to, const uint8_t* from, int begin, int bytes, int chunk, bool valid = true) {
  const int at = begin / 16 * 16 + chunk * 16;
  if (!valid || at < begin + bytes) ptx::cp_async<16>(to + chunk * 16, valid ? from + at : from, valid);
}

// Expands keys [from, from + kCount) of a run to rows of kDim elements, 8 a lane, some rows side by side; one warp. `row`: the member
// of their places that says where they lie. Reader, which makes elements of a format's staged bytes:
//   kTogether                          passes over side-by-side rows, at most, that are prepared together
//   prepare(stage, places, base, end)  all lanes; the next keys, from `base` on
//   words(stage, key, place, i)        8 elements of a key in a record, in pass i of those
template <class T, int kDim, int kPitch, int kCount, bool kRotated, class Reader>
KVK_DEVICE void expand_keys(Reader reader, T* tile, const uint8_t* stage, const RecordPlace* places,
                            int64_t RecordPlace::* row, const T* dense, int from, float rotate_scale, float* scratch) {
  constexpr int kLanes = kDim / 8, kRows = 32 / kLanes, kPasses = ceil_div(kCount, kRows);
  constexpr int kTogether = kPasses < Reader::kTogether ? kPasses : Reader::kTogether;
  const int lane = threadIdx.x % 32, unit = lane % kLanes;
  KVK_NO_UNROLL
  for (int base = from; base < from + kCount; base += kTogether * kRows) {
    reader.prepare(stage, places, base, from + kCount);
    KVK_UNROLL
    for (int pass = 0; pass < kTogether; ++pass) {
      const int key = base + pass * kRows + lane / kLanes;
      const bool valid = lane < kRows * kLanes && key < from + kCount;
      RecordPlace place;
      if (valid) place = places[key];
      Words<4> words = {};
      if (place.visible && place.token >= 0) {
        words = reader.words(stage, key, place, pass);
      } else if (place.visible) {
        words = load_words<4>(dense + place.*row + unit * 8);
      }
      if constexpr (kRotated) {
        const bool rotate = place.visible && place.token < 0;
        if (__any_sync(0xffffffffu, rotate)) {
          float y[8];
          unpack<T>(rotate ? words : Words<4>{}, y);
          WarpRows<kDim>::template rotate<false>(y, rotate_scale, scratch);
          KVK_UNROLL
          for (int i = 0; i < 4; ++i) words.w[i] = rotate ? pack2<T>(y[2 * i], y[2 * i + 1]) : words.w[i];
        }
      }
      if (valid) {
        store_words(tile + key * kPitch + unit * 8, words);
        if (kDim % 16 != 0 && unit == kLanes - 1) store_words<4>(tile + key * kPitch + kDim, {});  // padding
      }
    }
  }
}

// What a format of records, Format, inherits. It adds staged(head dims, keys) and, of K and of V, how a run of Config::kKeys keys is
// staged: RunK<Config> and RunV<Config> with kStage.bytes, kRotatedRows, load, which starts the copies, and Reader.
template <class Format>
struct RecordPages {
  using DecodeParams = RecordDecodeParams;
  using PrefillParams = RecordPrefillParams;
  using Place = RecordPlace;

  template <class Params, uint32_t kParts>
  KVK_DEVICE static RecordPlace place(const Params& params, const PagedItem<kParts>& item, int32_t key) {
    RecordPlace place;
    if (key < item.begin || key >= item.end) return place;
    const PagedProblem& p = params.problem;
    const Records& records = params.records;
    const KeySlot at = item.slot(p, key);
    const int64_t page = at.page & 0x0fffffff;
    const bool dense = at.page >> 28 != 0;
    place.visible = true;
    if constexpr (kParts & kKeyBias) {
      place.bias = item.bias(p, dense ? records.num_pages + page : page, at.slot);
      place.visible = place.bias != -kInfinity;
    }
    if (dense) {
      place.k = page * p.k.page_stride + at.slot * p.k.token_stride + item.kv_head * p.k.head_stride;
      place.v = page * p.v.page_stride + at.slot * p.v.token_stride + item.kv_head * p.v.head_stride;
    } else {
      place.k = page * records.k.page_stride + item.kv_head * records.k.head_stride;
      place.v = page * records.v.page_stride + item.kv_head * records.v.head_stride;
      place.token = static_cast<int32_t>(at.slot);
    }
    return place;
  }

  KVK_DEVICE static bool is_dense(const RecordPlace& place) { return place.token < 0; }

  // 8 elements a lane, rows side by side as in WarpRows.
  template <class Config>
  KVK_DEVICE static void rotate_query(const RecordDecodeParams& params, float (&x)[8], float* scratch) {
    WarpRows<Config::kHeadDim>::template rotate<false>(x, params.records.k_rotate_scale, scratch);
  }
  template <class Config>
  KVK_DEVICE static void rotate_query(const RecordPrefillParams& params, float (&x)[8], float* scratch) {
    WarpRows<Config::kHeadDim>::template rotate<false>(x, params.records.k_rotate_scale, scratch);
  }

  // Copies and expands the keys of a run: what decode does with a warp and prefill with a block.
  template <class Config>
  struct Runs {
    using T = typename Config::T;
    using K = typename Format::template RunK<Config>;
    using V = typename Format::template RunV<Config>;
    static constexpr int kDim = Config::kHeadDim, kDimV = Config::kHeadDimV;

    KVK_DEVICE static void load(const Records& records, const PagedProblem& p, uint8_t* stage,
                                const RecordPlace* places, int32_t first, int32_t begin, int thread, int threads) {
      K::load(records.k, stage, places, &RecordPlace::k, first, begin, thread, threads);
      V::load(records.v, stage + K::kStage.bytes, places, &RecordPlace::v, first, begin, thread, threads);
      for (int key = thread; key < Config::kKeys; key += threads) {  // dense rows are read later
        const RecordPlace& place = places[key];
        if (!place.visible || place.token >= 0) continue;
        prefetch(static_cast<const T*>(p.k.data) + place.k, kDim);
        prefetch(static_cast<const T*>(p.v.data) + place.v, kDimV);
      }
    }
    template <int kCount>
    KVK_DEVICE static void expand(const Records& records, const PagedProblem& p, T* k, T* v, const uint8_t* stage,
                                  const RecordPlace* places, int32_t first, int from, float* scratch) {
      // Keys are never rotated: q is.
      expand_keys<T, kDim, Config::kPitch, kCount, false>(typename K::Reader(first), k, stage, places, &RecordPlace::k,
                                                          static_cast<const T*>(p.k.data), from, 0.0f, scratch);
      expand_keys<T, kDimV, Config::kPitchV, kCount, V::kRotatedRows>(
          typename V::Reader(first), v, stage + K::kStage.bytes, places, &RecordPlace::v,
          static_cast<const T*>(p.v.data), from, records.v_rotate_scale, scratch);
    }

   private:
    KVK_DEVICE static void prefetch(const T* row, int columns) {
      for (int i = 0; i < columns; i += 64) ptx::prefetch_l2(row + i);
    }
  };

  // A warp's ring of raw stages, and its one expanded tile.
  template <class Config>
  class DecodeRing {
   public:
    using T = typename Config::T;
    using Item = PagedItem<Config::kParts>;
    static constexpr PagedDecodeShape kShape = Config::kShape;

    KVK_DEVICE DecodeRing(SmemCarver& carve, const RecordDecodeParams& params, int warp) : params_(params) {
      ring_ = carve.take<uint8_t>(size_t(Config::kWarps) * kShape.ring_bytes(), 128);
      places_ = carve.take<RecordPlace>(kShape.slots()) + warp * Config::kStages * Config::kKeys;
      tile_ = carve.take<T>(size_t(Config::kWarps) * kShape.tile_elements()) + warp * kShape.tile_elements();
      scratch_ = reinterpret_cast<float*>(carve.take<uint8_t>(size_t(Config::kWarps) * kShape.staged.scratch) +
                                          warp * kShape.staged.scratch);
      mine_ = ring_ + warp * kShape.ring_bytes();
    }

    KVK_DEVICE const T* k(int) const { return tile_; }
    KVK_DEVICE const T* v(int) const { return tile_ + Config::kKeys * Config::kPitch; }
    KVK_DEVICE float bias(int stage, int key) const { return places_[stage * Config::kKeys + key].bias; }
    KVK_DEVICE bool is_dense(int stage, int key) const {
      return RecordPages::is_dense(places_[stage * Config::kKeys + key]);
    }
    KVK_DEVICE float* rows(int warp) const { return reinterpret_cast<float*>(ring_ + warp * kShape.ring_bytes()); }

    KVK_DEVICE float* scratch() const { return scratch_; }

    KVK_DEVICE void load(const Item& item, int stage, int32_t first, const RecordPlace& mine, int lane) const {
      RecordPlace* places = places_ + stage * Config::kKeys;
      if (lane < Config::kKeys) places[lane] = mine;
      __syncwarp();  // the places are there for all lanes
      Runs<Config>::load(params_.records, params_.problem, mine_ + stage * kShape.staged.records, places, first,
                         item.begin, lane, 32);
    }
    KVK_DEVICE void tile(const Item&, int stage, int32_t first, int) const {
      Runs<Config>::template expand<Config::kKeys>(
          params_.records, params_.problem, tile_, tile_ + Config::kKeys * Config::kPitch,
          mine_ + stage * kShape.staged.records, places_ + stage * Config::kKeys, first, 0, scratch_);
      __syncwarp();  // the tile is there for all lanes
    }

   private:
    const RecordDecodeParams& params_;
    uint8_t* ring_;
    uint8_t* mine_;
    RecordPlace* places_;
    T* tile_;
    float* scratch_;
  };

  // A block's two raw stages, and its one expanded tile.
  template <class Config>
  class PrefillTiles {
   public:
    using T = typename Config::T;
    using Item = PagedItem<Config::kParts>;
    static constexpr PagedPrefillShape kShape = Config::kShape;

    KVK_DEVICE PrefillTiles(SmemCarver& carve, const RecordPrefillParams& params) : params_(params) {
      k_ = carve.take<T>(kShape.k_elements());
      v_ = carve.take<T>(kShape.v_elements());
      stages_ = carve.take<uint8_t>(size_t(Config::kStages) * kShape.staged.records);
      scratch_ = reinterpret_cast<float*>(carve.take<uint8_t>(size_t(Config::kWarps) * kShape.staged.scratch) +
                                          threadIdx.x / 32 * kShape.staged.scratch);
    }

    KVK_DEVICE const T* k(int) const { return k_; }
    KVK_DEVICE const T* v(int) const { return v_; }

    KVK_DEVICE float* scratch() const { return scratch_; }

    KVK_DEVICE void load(const Item& item, int stage, int32_t first, const RecordPlace* places) const {
      Runs<Config>::load(params_.records, params_.problem, stages_ + stage * kShape.staged.records, places, first,
                         item.begin, threadIdx.x, Config::kThreads);
    }
    KVK_DEVICE void tile(const Item&, int stage, int32_t first, const RecordPlace* places) const {
      constexpr int kMine = Config::kKeys / Config::kWarps;
      Runs<Config>::template expand<kMine>(params_.records, params_.problem, k_, v_,
                                           stages_ + stage * kShape.staged.records, places, first,
                                           threadIdx.x / 32 * kMine, scratch_);
      __syncthreads();  // the tile is there for all warps
    }

   private:
    const RecordPrefillParams& params_;
    T* k_;
    T* v_;
    uint8_t* stages_;
    float* scratch_;
  };
};

}  // namespace kvk::device
