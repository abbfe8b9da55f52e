// The decode step of lightning attention: S = exp(log_decay) S + k v^T, out = scale * S^T q, a state of the pool a row.
//
// Bytes: each state read and written once, 8 * Dk * Dv; 5 operations for 8 bytes: bound by memory.
// Tile: a block takes 32 columns of one state, 128 bytes of a row, so that a batch of one with 16 heads of 128 still has 64
// blocks. A warp's lanes stand at four rows of the state, a block's at 16, and 8 loads of 16 bytes a thread are under way at a
// time. The order of the sums over rows depends on Dk alone.
#pragma once

#include "kvk/device/lightning_params.h"
#include "kvk/device/types.h"

namespace kvk::device {

// 4 consecutive elements, on a multiple of their size.
template <class T>
KVK_DEVICE void load_four(const T* from, float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    const Words<4> words = load_words<4>(from);
    KVK_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(words.w[i]);
  } else {
    const Words<2> words = load_words<2>(from);
    KVK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<T>(words.w[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}
template <class T>
KVK_DEVICE void store_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    store_words<4>(to, {{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}});
  } else {
    store_words<2>(to, {{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])}});
  }
}

template <class T>
class LightningDecodeBlock {
 public:
  static constexpr int kThreads = 128, kLanes = kLightningDecodeColumns / 4, kRows = kThreads / kLanes, kAtOnce = 8;

  KVK_DEVICE explicit LightningDecodeBlock(const LightningDecodeParams& p) : p_(p) {
    const int64_t tiles = ceil_div(p.dv, kLightningDecodeColumns), index = int64_t{blockIdx.x} / tiles;
    row_ = index / p.num_heads;
    head_ = index % p.num_heads;
    column_ = static_cast<int>(blockIdx.x % tiles) * kLightningDecodeColumns + threadIdx.x % kLanes * 4;
  }

  KVK_DEVICE void run() {
    const bool inside = column_ < p_.dv;
    const bool writes = inside && threadIdx.x < kLanes;
    T* const out = static_cast<T*>(p_.out.data) + row_ * p_.out.token_stride + head_ * p_.out.head_stride + column_;
    const int64_t slot = p_.slots[row_ * p_.slots_stride];
    if (slot < 0 || slot >= p_.num_slots) {  // a slot past the pool must not write outside of it
      if (writes) store_four(out, {0.0f, 0.0f, 0.0f, 0.0f});
      return;
    }
    KVK_SHARED(query, float[kMostLightningDim]);
    KVK_SHARED(key, float[kMostLightningDim]);
    for (int d = threadIdx.x; d < p_.dk; d += kThreads) {
      query[d] = to_float(at(p_.q)[d]) * p_.scale;
      key[d] = to_float(at(p_.k)[d]);
    }
    __syncthreads();  // q and k are there for all warps
    float sums[4] = {};
    if (inside)
      update(p_.state.data + slot * p_.state.slot_stride + head_ * p_.state.head_stride + column_, query, key, sums);
    reduce(sums);
    if (writes) store_four(out, sums);
  }

 private:
  KVK_DEVICE const T* at(const RowsView& rows) const {
    return static_cast<const T*>(rows.data) + row_ * rows.token_stride + head_ * rows.head_stride;
  }

  // This thread's rows of the state, and its part of the sums over rows.
  KVK_DEVICE void update(float* state, const float* query, const float* key, float (&sums)[4]) const {
    const float* log = p_.log_decay.at(row_, head_);
    const float decay = log == nullptr ? 1.0f : expf(*log);
    float value[4];
    load_four(at(p_.v) + column_, value);
    KVK_NO_UNROLL
    for (int first = threadIdx.x / kLanes; first < p_.dk; first += kRows * kAtOnce) {
      float s[kAtOnce][4];
      KVK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int d = first + i * kRows;
        if (d < p_.dk) load_four(state + d * p_.state.row_stride, s[i]);
      }
      KVK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int d = first + i * kRows;
        if (d >= p_.dk) break;
        KVK_UNROLL
        for (int c = 0; c < 4; ++c) {
          s[i][c] = s[i][c] * decay + key[d] * value[c];
          sums[c] += query[d] * s[i][c];
        }
        store_four(state + d * p_.state.row_stride, s[i]);
      }
    }
  }

  // The sums of the block, in the threads of its first 8 lanes.
  KVK_DEVICE static void reduce(float (&sums)[4]) {
    KVK_SHARED(parts, float[kThreads / 32][kLightningDecodeColumns]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    KVK_UNROLL
    for (int c = 0; c < 4; ++c) {
      KVK_UNROLL
      for (int step = kLanes; step < 32; step *= 2) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], step);
      if (lane < kLanes) parts[warp][lane * 4 + c] = sums[c];
    }
    __syncthreads();  // the parts of all warps are there
    if (threadIdx.x >= kLanes) return;
    KVK_UNROLL
    for (int c = 0; c < 4; ++c) {
      sums[c] = parts[0][lane * 4 + c];
      KVK_UNROLL
      for (int other = 1; other < kThreads / 32; ++other) sums[c] += parts[other][lane * 4 + c];
    }
  }

  const LightningDecodeParams& p_;
  int64_t row_, head_;
  int column_;
};

template <class T>
KVK_KERNEL(LightningDecodeBlock<T>::kThreads, 4)
lightning_decode_kernel(const __grid_constant__ LightningDecodeParams p) {
  LightningDecodeBlock<T>(p).run();
}

}  // namespace kvk::device
