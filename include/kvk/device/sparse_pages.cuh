// Format: records of bitmaps (docs/formats.md), mixed with dense pages by the tag of a page reference.
//
// Bytes: a key's kept values and its bitmap once per kv head and tile; a bitmap of fewer than 16 bytes comes with its neighbours'.
// Operations: for 8 elements of a lane some 44 to put them apart, 18 of them byte permutations and 3 to 5 loads of 4 bytes from
// shared memory; 10 for the pass (place, addresses, one store of 16 bytes); and 8, a quarter of what four passes take together, to
// find where the values are (1 byte load, 1 shuffle and 1 addition of each step of a prefix sum, 10 to count bits): 7.8 an element,
// 62 warp instructions a key of head dim 128 with K and V, beside some 16 of the engine.
// Bound: at head dim 128 an SM issues those in some 20 cycles; its share of an H100's memory brings a key in 19 at 50% and in 13 at
// 70% pruned (34 dense). So memory binds up to 50%, from there on the instructions. Shared memory moves a key in about 16.
#pragma once

#include "kvk/device/record_pages.cuh"
#include "kvk/device/sparse_bits.cuh"
#include "kvk/device/sparse_pages_params.h"

namespace kvk::device {

// K, or V, of a run of kKeys keys: from records to the stage, and from there to elements.
template <int kDim, int kKeys, int kKeep, bool kRotated>
struct BitmapRun {
  static constexpr bool kRotatedRows = kRotated;
  static constexpr BitmapStage kStage = BitmapStage(kDim, kKeep, kKeys);
  static constexpr int kLanes = kDim / 8, kRows = 32 / kLanes;

  // Starts the copies; `thread` of `threads`.
  KVK_DEVICE static void load(const RecordPool& pool, uint8_t* stage, const RecordPlace* places,
                              int64_t RecordPlace::* record, int32_t, int32_t, int thread, int threads) {
    constexpr int kChunks = kStage.value_bytes / 16, kBitmapChunks = kStage.bitmap_bytes / 16;
    KVK_NO_UNROLL
    for (int i = thread; i < kKeys * kChunks; i += threads) {
      // A key that is not in a record gets zeros: what is read behind a row's values shall be defined.
      const RecordPlace& place = places[i / kChunks];
      const bool valid = in_record(place);
      copy_chunk(stage + i / kChunks * kStage.value_bytes, pool.data + (valid ? place.*record : 0),
                 valid ? place.token * kStage.value_bytes : 0, kStage.value_bytes, i % kChunks, valid);
    }
    KVK_NO_UNROLL
    for (int i = thread; i < kKeys * kBitmapChunks; i += threads) {  // and keeps nothing
      const RecordPlace& place = places[i / kBitmapChunks];
      const bool valid = in_record(place);
      copy_chunk(stage + kStage.bitmap_at + i / kBitmapChunks * kStage.bitmap_bytes,
                 pool.data + (valid ? place.*record + pool.part_offset[0] : 0),
                 valid ? place.token * kStage.row_bytes : 0, kStage.row_bytes, i % kBitmapChunks, valid);
    }
  }

  // Puts the values of a stage apart. The bits of four passes, a byte each, find the places of their values together.
  class Reader {
   public:
    static constexpr int kTogether = 4;

    KVK_DEVICE explicit Reader(int32_t) {}

    KVK_DEVICE void prepare(const uint8_t* stage, const RecordPlace* places, int base, int end) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      bits_ = 0;
      KVK_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const int key = base + i * kRows + lane / kLanes;
        if (lane >= kRows * kLanes || key >= end) continue;
        int at = kStage.bitmap_at + key * kStage.bitmap_bytes + lane % kLanes;
        if constexpr (kStage.row_bytes % 16 != 0) {
          if (in_record(places[key])) at += places[key].token * kStage.row_bytes % 16;
        }
        bits_ |= uint32_t{stage[at]} << (8 * i);
      }
      counts_ = popc_bytes(bits_);
      before_ = sum_before<kLanes>(counts_);
    }

    KVK_DEVICE Words<4> words(const uint8_t* stage, int key, const RecordPlace&, int pass) const {
      return put_apart(stage + key * kStage.value_bytes, bits_ >> (8 * pass) & 0xffu, counts_ >> (8 * pass) & 0xffu,
                       before_ >> (8 * pass) & 0xffu);
    }

   private:
    uint32_t bits_, counts_, before_;  // this lane's bits, how many are set, and those of the row before them
  };

 private:
  KVK_DEVICE static bool in_record(const RecordPlace& place) { return place.visible && place.token >= 0; }
};

// Elements of a row that are kept, and whether rows are rotated; of K, then of V.
template <int kKKeep, bool kKRotated, int kVKeep, bool kVRotated>
struct BitmapPages : RecordPages<BitmapPages<kKKeep, kKRotated, kVKeep, kVRotated>> {
  KVK_HOST_DEVICE static constexpr StagedBytes staged(int head_dim, int head_dim_v, int keys) {
    return bitmap_staged(head_dim, head_dim_v, {kKKeep, kKRotated}, {kVKeep, kVRotated}, keys);
  }

  template <class Config>
  using RunK = BitmapRun<Config::kHeadDim, Config::kKeys, kKKeep, kKRotated>;
  template <class Config>
  using RunV = BitmapRun<Config::kHeadDimV, Config::kKeys, kVKeep, kVRotated>;
};

}  // namespace kvk::device
