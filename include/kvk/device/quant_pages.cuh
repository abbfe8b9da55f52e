// Format: quantized records (docs/formats.md), mixed with dense pages by the tag of a page reference.
//
// Bytes: a key's codes and scales once per kv head and tile; scales of groups along tokens once more for each tile of a group.
// Operations: an element is expanded in about 3.5 instructions (a shift, an and-or that makes a float of 256 + code, one fused
// multiply-add that takes the 256 away again, half a conversion), 28 warp instructions a key of head dim 128 beside 4 mma: with
// 2 bits some 9 cycles of an SM against 5 of its share of an H100's memory, so bound by instructions below 4 bits, by both
// there, and by memory at 8.
// Pipeline: records are copied raw by cp.async, stage by stage, a quarter of the bytes of dense rows; a warp expands the 16 keys
// it needs next (in prefill: its part of the block's tile) to the element type, and the engine goes on as with dense pages.
// Dense keys are read when their tile is due, from L2 where they have been asked for. Rotated records: q is rotated at the
// start, and dense keys count with q as it is, so that neither is rounded twice; dense values are rotated on the way, and
// the output is rotated back after the kernel.
#pragma once

#include "kvk/device/hadamard.cuh"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/quant_codes.cuh"
#include "kvk/device/quant_pages_params.h"

namespace kvk::device {

// Where one key lies, in a record or in a dense page.
struct RecordPlace {
  int64_t k = 0, v = 0;  // bytes from the pool's start to the record; of a dense page, elements to the key's row
  float bias = 0.0f;
  int32_t token = -1;    // in the record; -1: a dense page, or no key
  bool visible = false;  // a hidden key is not read: zeros stand in for it
};
static_assert(sizeof(RecordPlace) == kRecordPlaceBytes);

// K, or V, of a run of kKeys keys: from records to the stage, and from there to a tile of T.
template <class T, int kDim, int kPitch, int kKeys, int kBits, int kGroup, bool kAlongTokens, bool kRotated>
struct QuantRun {
  static constexpr QuantPart kPart = {kBits, kGroup, kAlongTokens, kRotated};
  static constexpr QuantStage kStage = QuantStage(kDim, kPart, kKeys);

  // Starts the copies; `thread` of `threads`. first: position of the run's first key; begin: keys before it have no place.
  KVK_DEVICE static void load(const RecordPool& pool, uint8_t* stage, const RecordPlace* places,
                              int64_t RecordPlace::* record, int32_t first, int32_t begin, int thread, int threads) {
    constexpr int kChunks = kStage.code_bytes / 16, kScaleChunks = kStage.scale_bytes / 16;
    KVK_NO_UNROLL
    for (int i = thread; i < kKeys * kChunks; i += threads) {
      const int key = i / kChunks, chunk = i % kChunks;
      const RecordPlace& place = places[key];
      if (!place.visible || place.token < 0) continue;
      copy_chunk(stage + key * kStage.code_bytes, pool.data + place.*record, place.token * kStage.row_bytes,
                 kStage.row_bytes, chunk);
    }
    KVK_NO_UNROLL
    for (int i = thread; i < kStage.scale_rows * kScaleChunks * 2; i += threads) {
      const bool is_min = i & 1;
      const int row = i / 2 / kScaleChunks, chunk = i / 2 % kScaleChunks;
      // Of a group of tokens, any key that has a place tells where the record is.
      const int key = kAlongTokens ? first_key_of(row, first, begin) : row;
      if (key >= kKeys) continue;
      const RecordPlace& place = places[key];
      if (place.token < 0 || (!kAlongTokens && !place.visible)) continue;
      uint8_t* to = stage + (is_min ? kStage.min_at : kStage.scale_at) + row * kStage.scale_bytes;
      copy_chunk(to, pool.data + place.*record + (is_min ? pool.min_offset : pool.scale_offset),
                 (kAlongTokens ? place.token / kGroup : place.token) * kStage.scale_row_bytes, kStage.scale_row_bytes,
                 chunk);
    }
  }

  // Expands keys [from, from + count) of the run; one warp. dense: of `dense_row`, the same member of their places.
  KVK_DEVICE static void expand(T* tile, const uint8_t* stage, const RecordPlace* places, int64_t RecordPlace::* row,
                                const T* dense, int32_t first, int from, int count, float rotate_scale,
                                float* scratch) {
    constexpr int kLanes = kDim / 8, kRows = 32 / kLanes;
    const int lane = threadIdx.x % 32, unit = lane % kLanes;
    int scales_of = -1;  // row of scales that these are of
    float scale[8], shift[8];
    KVK_NO_UNROLL
    for (int base = from; base < from + count; base += kRows) {
      const int key = base + lane / kLanes;
      const bool valid = lane < kRows * kLanes && key < from + count;
      RecordPlace place;
      if (valid) place = places[key];
      float x[8] = {};
      if (place.visible && place.token >= 0) {
        const int scale_row = kAlongTokens ? (first + key) / kGroup - first / kGroup : key;
        if (scale_row != scales_of) {
          load_scales(stage, scale_row, place.token, unit, scale, shift);
          scales_of = scale_row;
        }
        const PackedCodes<kBits> codes =
            load_codes<kBits>(stage + key * kStage.code_bytes + place.token * kStage.row_bytes % 16 + unit * kBits);
        KVK_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = saturated<T>(__fmaf_rn(codes.plus_256(i), scale[i], shift[i]));
      } else if (place.visible) {
        load_elements(dense + place.*row + unit * 8, true, x);
      }
      if constexpr (kRotated) {
        const bool rotate = place.visible && place.token < 0;
        if (__any_sync(0xffffffffu, rotate)) {
          float y[8];
          KVK_UNROLL
          for (int i = 0; i < 8; ++i) y[i] = rotate ? x[i] : 0.0f;
          WarpRows<kDim>::template rotate<false>(y, rotate_scale, scratch);
          if (rotate) {
            KVK_UNROLL
            for (int i = 0; i < 8; ++i) x[i] = y[i];
          }
        }
      }
      if (valid) {
        store_elements(tile + key * kPitch + unit * 8, true, x);
        if (kDim % 16 != 0 && unit == kLanes - 1) store_words<4>(tile + key * kPitch + kDim, {});  // padding
      }
    }
  }

 private:
  // First key of the run in its scale_row'th group of tokens that has a place; kKeys and more: none.
  KVK_DEVICE static int first_key_of(int scale_row, int32_t first, int32_t begin) {
    const int32_t start = scale_row == 0 ? first : (first / kGroup + scale_row) * kGroup;
    return (start > begin ? start : begin) - first;
  }

  // Chunk `chunk` of the bytes [begin, begin + bytes) of `from`, if it holds any of them.
  KVK_DEVICE static void copy_chunk(uint8_t* to, const uint8_t* from, int begin, int bytes, int chunk) {
    const int at = begin / 16 * 16 + chunk * 16;
    if (at < begin + bytes) ptx::cp_async<16>(to + chunk * 16, from + at);
  }

  // Of 8 channels: scale, and min - 256 * scale for codes that come as 256 + code.
  KVK_DEVICE static void load_scales(const uint8_t* stage, int scale_row, int32_t token, int unit, float (&scale)[8],
                                     float (&shift)[8]) {
    const int row = scale_row * kStage.scale_bytes;
    if constexpr (kAlongTokens) {
      load_elements(reinterpret_cast<const f16*>(stage + kStage.scale_at + row) + unit * 8, true, scale);
      load_elements(reinterpret_cast<const f16*>(stage + kStage.min_at + row) + unit * 8, true, shift);
    } else {
      const int at = row + token * kStage.scale_row_bytes % 16 + unit * 8 / kGroup * 2;
      const float one_scale = to_float(*reinterpret_cast<const f16*>(stage + kStage.scale_at + at));
      const float one_min = to_float(*reinterpret_cast<const f16*>(stage + kStage.min_at + at));
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) {
        scale[i] = one_scale;
        shift[i] = one_min;
      }
    }
    KVK_UNROLL
    for (int i = 0; i < 8; ++i) shift[i] = __fmaf_rn(-256.0f, scale[i], shift[i]);
  }
};

// Bits, group, whether groups run along tokens, and whether rows are rotated; of K, then of V.
template <int kKBits, int kKGroup, bool kKAlong, bool kKRotated, int kVBits, int kVGroup, bool kVAlong, bool kVRotated>
struct QuantPages {
  using DecodeParams = QuantDecodeParams;
  using PrefillParams = QuantPrefillParams;
  using Place = RecordPlace;

  KVK_HOST_DEVICE static constexpr StagedBytes staged(int head_dim, int head_dim_v, int keys) {
    return quant_staged(head_dim, head_dim_v, {kKBits, kKGroup, kKAlong, kKRotated},
                        {kVBits, kVGroup, kVAlong, kVRotated}, keys);
  }

  template <class Params, uint32_t kParts>
  KVK_DEVICE static RecordPlace place(const Params& params, const PagedItem<kParts>& item, int32_t key) {
    RecordPlace place;
    if (key < item.begin || key >= item.end) return place;
    const PagedProblem& p = params.problem;
    const QuantRecords& records = params.records;
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
  KVK_DEVICE static void rotate_query(const QuantDecodeParams& params, float (&x)[8], float* scratch) {
    WarpRows<Config::kHeadDim>::template rotate<false>(x, params.records.k_rotate_scale, scratch);
  }
  template <class Config>
  KVK_DEVICE static void rotate_query(const QuantPrefillParams& params, float (&x)[8], float* scratch) {
    WarpRows<Config::kHeadDim>::template rotate<false>(x, params.records.k_rotate_scale, scratch);
  }

  // Keys are never rotated: q is.
  template <class Config>
  using RunK =
      QuantRun<typename Config::T, Config::kHeadDim, Config::kPitch, Config::kKeys, kKBits, kKGroup, kKAlong, false>;
  template <class Config>
  using RunV = QuantRun<typename Config::T, Config::kHeadDimV, Config::kPitchV, Config::kKeys, kVBits, kVGroup, kVAlong,
                        kVRotated>;

  // Copies and expands the keys of a run: what decode does with a warp and prefill with a block.
  template <class Config>
  struct Runs {
    using T = typename Config::T;
    using K = RunK<Config>;
    using V = RunV<Config>;

    KVK_DEVICE static void load(const QuantRecords& records, const PagedProblem& p, uint8_t* stage,
                                const RecordPlace* places, int32_t first, int32_t begin, int thread, int threads) {
      K::load(records.k, stage, places, &RecordPlace::k, first, begin, thread, threads);
      V::load(records.v, stage + K::kStage.bytes, places, &RecordPlace::v, first, begin, thread, threads);
      for (int key = thread; key < Config::kKeys; key += threads) {  // dense rows are read later
        const RecordPlace& place = places[key];
        if (!place.visible || place.token >= 0) continue;
        prefetch(static_cast<const T*>(p.k.data) + place.k, Config::kHeadDim);
        prefetch(static_cast<const T*>(p.v.data) + place.v, Config::kHeadDimV);
      }
    }
    KVK_DEVICE static void expand(const QuantRecords& records, const PagedProblem& p, T* k, T* v, const uint8_t* stage,
                                  const RecordPlace* places, int32_t first, int from, int count, float* scratch) {
      K::expand(k, stage, places, &RecordPlace::k, static_cast<const T*>(p.k.data), first, from, count,
                records.k_rotate_scale, scratch);
      V::expand(v, stage + K::kStage.bytes, places, &RecordPlace::v, static_cast<const T*>(p.v.data), first, from,
                count, records.v_rotate_scale, scratch);
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

    KVK_DEVICE DecodeRing(SmemCarver& carve, const QuantDecodeParams& params, int warp) : params_(params) {
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
      return QuantPages::is_dense(places_[stage * Config::kKeys + key]);
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
      Runs<Config>::expand(params_.records, params_.problem, tile_, tile_ + Config::kKeys * Config::kPitch,
                           mine_ + stage * kShape.staged.records, places_ + stage * Config::kKeys, first, 0,
                           Config::kKeys, scratch_);
      __syncwarp();  // the tile is there for all lanes
    }

   private:
    const QuantDecodeParams& params_;
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

    KVK_DEVICE PrefillTiles(SmemCarver& carve, const QuantPrefillParams& params) : params_(params) {
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
      Runs<Config>::expand(params_.records, params_.problem, k_, v_, stages_ + stage * kShape.staged.records, places,
                           first, threadIdx.x / 32 * kMine, kMine, scratch_);
      __syncthreads();  // the tile is there for all warps
    }

   private:
    const QuantPrefillParams& params_;
    T* k_;
    T* v_;
    uint8_t* stages_;
    float* scratch_;
  };
};

}  // namespace kvk::device
