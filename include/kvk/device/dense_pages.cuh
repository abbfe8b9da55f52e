// Format: dense pages of the kernel's element type, NHD or HND by strides. Rows are copied to shared memory as they are.
#pragma once

#include "kvk/device/page_format.h"
#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/device/smem.h"
#include "kvk/device/tile_products.cuh"

namespace kvk::device {

struct DensePages {
  using DecodeParams = PagedDecodeParams;
  using PrefillParams = PagedPrefillParams;
  using Place = KeyPlace;

  KVK_HOST_DEVICE static constexpr StagedBytes staged(int, int, int) { return {}; }

  template <uint32_t kParts>
  KVK_DEVICE static KeyPlace place(const PagedProblem& p, const PagedItem<kParts>& item, int32_t key) {
    KeyPlace place;
    if (key < item.begin || key >= item.end) return place;
    const KeySlot at = item.slot(p, key);
    place.visible = true;
    if constexpr (kParts & kKeyBias) {
      place.bias = item.bias(p, at.page, at.slot);
      place.visible = place.bias != -kInfinity;
    }
    place.k = at.page * p.k.page_stride + at.slot * p.k.token_stride + item.kv_head * p.k.head_stride;
    place.v = at.page * p.v.page_stride + at.slot * p.v.token_stride + item.kv_head * p.v.head_stride;
    return place;
  }
  template <class Params, uint32_t kParts>
  KVK_DEVICE static KeyPlace place(const Params& params, const PagedItem<kParts>& item, int32_t key) {
    return place(params.problem, item, key);
  }

  template <class Config>
  class DecodeRing;
  template <class Config>
  class PrefillTiles;
};

// A warp's ring of stages in shared memory.
template <class Config>
class DensePages::DecodeRing {
 public:
  using T = typename Config::T;
  using Item = PagedItem<Config::kParts>;
  static constexpr int kK = Config::kKeys * Config::kPitch, kV = Config::kKeys * Config::kPitchV;

  KVK_DEVICE DecodeRing(SmemCarver& carve, const PagedDecodeParams& params, int warp) : p_(params.problem) {
    ring_ = carve.take<char>(size_t(Config::kWarps) * Config::kShape.ring_bytes(), 128);
    bias_ = carve.take<float>(Config::kShape.slots()) + warp * Config::kStages * Config::kKeys;
    mine_ = reinterpret_cast<T*>(rows(warp));
  }

  KVK_DEVICE T* k(int stage) const { return mine_ + stage * (kK + kV); }
  KVK_DEVICE T* v(int stage) const { return mine_ + stage * (kK + kV) + kK; }
  KVK_DEVICE float bias(int stage, int key) const {
    return Config::kParts & kKeyBias ? bias_[stage * Config::kKeys + key] : 0.0f;
  }
  KVK_DEVICE bool is_dense(int, int) const { return true; }
  // Floats [kRows, kDimV] in the place of a warp's ring when that is empty.
  KVK_DEVICE float* rows(int warp) const {
    return reinterpret_cast<float*>(ring_ + warp * Config::kShape.ring_bytes());
  }

  // Starts the copies of a tile whose keys lie at `mine` of lanes 0 to 15.
  KVK_DEVICE void load(const Item&, int stage, int32_t, const KeyPlace& mine, int lane) const {
    copy<Config::kHeadDim, Config::kDim, Config::kPitch>(k(stage), static_cast<const T*>(p_.k.data), mine.k,
                                                         mine.visible, lane);
    copy<Config::kHeadDimV, Config::kDimV, Config::kPitchV>(v(stage), static_cast<const T*>(p_.v.data), mine.v,
                                                            mine.visible, lane);
    if constexpr (Config::kParts & kKeyBias) {
      if (lane < Config::kKeys) bias_[stage * Config::kKeys + lane] = mine.bias;
    }
  }
  KVK_DEVICE void tile(const Item&, int, int32_t, int) const {}

 private:
  template <int kUsed, int kPadded, int kPitch>
  KVK_DEVICE static void copy(T* to, const T* from, int64_t offset, bool visible, int lane) {
    constexpr int kChunks = kPadded / 8, kRounds = Config::kKeys * kChunks / 32;
    constexpr int kUnrolled = kRounds % 8 == 0 ? 8 : kRounds;  // more at a time would cost registers
    KVK_NO_UNROLL
    for (int first = 0; first < kRounds; first += kUnrolled) {
      KVK_UNROLL
      for (int i = 0; i < kUnrolled; ++i) {
        const int index = (first + i) * 32 + lane, row = index / kChunks, chunk = index % kChunks;
        const int64_t at = __shfl_sync(0xffffffffu, offset, row);
        const bool valid = __shfl_sync(0xffffffffu, int{visible}, row) != 0 && chunk * 8 < kUsed;
        ptx::cp_async<16>(to + row * kPitch + chunk * 8, from + (valid ? at + chunk * 8 : 0), valid);
      }
    }
  }

  const PagedProblem& p_;
  char* ring_;
  float* bias_;
  T* mine_;
};

// A block's two stages of K and V.
template <class Config>
class DensePages::PrefillTiles {
 public:
  using T = typename Config::T;
  using Item = PagedItem<Config::kParts>;
  static constexpr size_t kTileK = Config::kShape.k_elements(), kTileV = Config::kShape.v_elements();

  KVK_DEVICE PrefillTiles(SmemCarver& carve, const PagedPrefillParams& params) : p_(params.problem) {
    k_ = carve.take<T>(Config::kStages * kTileK);
    v_ = carve.take<T>(Config::kStages * kTileV);
  }

  KVK_DEVICE const T* k(int stage) const { return k_ + stage * kTileK; }
  KVK_DEVICE const T* v(int stage) const { return v_ + stage * kTileV; }

  // Starts the copies of a tile; all threads of the block.
  KVK_DEVICE void load(const Item&, int stage, int32_t, const KeyPlace* places) const {
    copy<Config::kHeadDim, Config::kDim, Config::kPitch>(k_ + stage * kTileK, p_.k.data, places, &KeyPlace::k);
    copy<Config::kHeadDimV, Config::kDimV, Config::kPitchV>(v_ + stage * kTileV, p_.v.data, places, &KeyPlace::v);
  }
  KVK_DEVICE void tile(const Item&, int, int32_t, const KeyPlace*) const {}

 private:
  template <int kUsed, int kPadded, int kPitch>
  KVK_DEVICE static void copy(T* to, const void* from, const KeyPlace* places, int64_t KeyPlace::* offset) {
    copy_rows<kUsed, kPadded, kPitch, Config::kThreads>(
        to, from, Config::kKeys, [&](int row) { return places[row].visible ? places[row].*offset : kNoRow; });
  }

  const PagedProblem& p_;
  T* k_;
  T* v_;
};

}  // namespace kvk::device
