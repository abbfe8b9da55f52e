// Format: quantized records (docs/formats.md), mixed with dense pages by the tag of a page reference.
//
// Bytes: a key's codes and scales once per kv head and tile; scales of groups along tokens once more for each tile of a group.
// Operations: an element is expanded in about 3.5 instructions (a shift, an and-or that makes a float of 256 + code, one fused
// multiply-add that takes the 256 away again, half a conversion), 28 warp instructions a key of head dim 128 beside 4 mma: with
// 2 bits some 9 cycles of an SM against 5 of its share of an H100's memory, so bound by instructions below 4 bits, by both
// there, and by memory at 8.
#pragma once

#include "kvk/device/quant_codes.cuh"
#include "kvk/device/quant_pages_params.h"
#include "kvk/device/record_pages.cuh"

namespace kvk::device {

// K, or V, of a run of kKeys keys: from records to the stage, and from there to elements of T.
template <class T, int kDim, int kKeys, int kBits, int kGroup, bool kAlongTokens, bool kRotated>
struct QuantRun {
  static constexpr bool kRotatedRows = kRotated;
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
      copy_chunk(to, pool.data + place.*record + pool.part_offset[is_min ? 1 : 0],
                 (kAlongTokens ? place.token / kGroup : place.token) * kStage.scale_row_bytes, kStage.scale_row_bytes,
                 chunk);
    }
  }

  // Makes numbers of a stage's codes; one lane's. first: position of the run's first key.
  class Reader {
   public:
    static constexpr int kTogether = 1;

    KVK_DEVICE explicit Reader(int32_t first) : first_(first) {}

    KVK_DEVICE void prepare(const uint8_t*, const RecordPlace*, int, int) {}

    KVK_DEVICE Words<4> words(const uint8_t* stage, int key, const RecordPlace& place, int) {
      const int unit = threadIdx.x % 32 % (kDim / 8);
      const int scale_row = kAlongTokens ? (first_ + key) / kGroup - first_ / kGroup : key;
      if (scale_row != scales_of_) {
        load_scales(stage, scale_row, place.token, unit);
        scales_of_ = scale_row;
      }
      const PackedCodes<kBits> codes =
          load_codes<kBits>(stage + key * kStage.code_bytes + place.token * kStage.row_bytes % 16 + unit * kBits);
      Words<4> words;
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) words.w[i] = pack2<T>(number(codes, 2 * i), number(codes, 2 * i + 1));
      return words;
    }

   private:
    KVK_DEVICE float number(const PackedCodes<kBits>& codes, int i) const {
      return saturated<T>(__fmaf_rn(codes.plus_256(i), scale_[i], shift_[i]));
    }

    // Of 8 channels: scale, and min - 256 * scale for codes that come as 256 + code.
    KVK_DEVICE void load_scales(const uint8_t* stage, int scale_row, int32_t token, int unit) {
      const int row = scale_row * kStage.scale_bytes;
      if constexpr (kAlongTokens) {
        load_elements(reinterpret_cast<const f16*>(stage + kStage.scale_at + row) + unit * 8, true, scale_);
        load_elements(reinterpret_cast<const f16*>(stage + kStage.min_at + row) + unit * 8, true, shift_);
      } else {
        const int at = row + token * kStage.scale_row_bytes % 16 + unit * 8 / kGroup * 2;
        const float one_scale = to_float(*reinterpret_cast<const f16*>(stage + kStage.scale_at + at));
        const float one_min = to_float(*reinterpret_cast<const f16*>(stage + kStage.min_at + at));
        KVK_UNROLL
        for (int i = 0; i < 8; ++i) {
          scale_[i] = one_scale;
          shift_[i] = one_min;
        }
      }
      KVK_UNROLL
      for (int i = 0; i < 8; ++i) shift_[i] = __fmaf_rn(-256.0f, scale_[i], shift_[i]);
    }

    int32_t first_;
    int scales_of_ = -1;  // row of scales that these are of
    float scale_[8], shift_[8];
  };

 private:
  // First key of the run in its scale_row'th group of tokens that has a place; kKeys and more: none.
  KVK_DEVICE static int first_key_of(int scale_row, int32_t first, int32_t begin) {
    const int32_t start = scale_row == 0 ? first : (first / kGroup + scale_row) * kGroup;
    return (start > begin ? start : begin) - first;
  }
};

// Bits, group, whether groups run along tokens, and whether rows are rotated; of K, then of V.
template <int kKBits, int kKGroup, bool kKAlong, bool kKRotated, int kVBits, int kVGroup, bool kVAlong, bool kVRotated>
struct QuantPages : RecordPages<QuantPages<kKBits, kKGroup, kKAlong, kKRotated, kVBits, kVGroup, kVAlong, kVRotated>> {
  KVK_HOST_DEVICE static constexpr StagedBytes staged(int head_dim, int head_dim_v, int keys) {
    return quant_staged(head_dim, head_dim_v, {kKBits, kKGroup, kKAlong, kKRotated},
                        {kVBits, kVGroup, kVAlong, kVRotated}, keys);
  }

  template <class Config>
  using RunK = QuantRun<typename Config::T, Config::kHeadDim, Config::kKeys, kKBits, kKGroup, kKAlong, kKRotated>;
  template <class Config>
  using RunV = QuantRun<typename Config::T, Config::kHeadDimV, Config::kKeys, kVBits, kVGroup, kVAlong, kVRotated>;
};

}  // namespace kvk::device
