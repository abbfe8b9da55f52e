// Writes new keys and values into their slots. Bytes: every row once read and once written; bound by memory.
// Tile: one warp copies one token's row of one kv head, 16 bytes a lane where everything is so aligned, else by element.
#pragma once

#include "kvk/device/append_kv_params.h"
#include "kvk/device/types.h"

namespace kvk::device {

// Rows of `columns` elements of kBytes each; one warp.
template <int kBytes>
KVK_DEVICE void copy_row(const char* from, char* to, int columns, bool vectors, int lane) {
  if (vectors) {
    for (int i = lane; i < columns * kBytes / 16; i += 32) store_words(to + i * 16, load_words_once(from + i * 16));
    return;
  }
  for (int i = lane; i < columns; i += 32) {
    if constexpr (kBytes == 2) {
      reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
    } else {
      reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  }
}

template <int kBytes>
KVK_KERNEL(128, 1)
append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int64_t token = row / p.num_kv_heads, head = row % p.num_kv_heads;
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slots[token * p.slot_stride];
  if (slot < 0 || slot >= p.num_slots) return;  // a slot past the pool must not write outside of it
  const int64_t page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t from_k = token * p.k.token_stride + head * p.k.head_stride;
  const int64_t from_v = token * p.v.token_stride + head * p.v.head_stride;
  const int64_t to_k = page * p.k_pages.page_stride + offset * p.k_pages.token_stride + head * p.k_pages.head_stride;
  const int64_t to_v = page * p.v_pages.page_stride + offset * p.v_pages.token_stride + head * p.v_pages.head_stride;
  copy_row<kBytes>(static_cast<const char*>(p.k.data) + from_k * kBytes,
                   static_cast<char*>(const_cast<void*>(p.k_pages.data)) + to_k * kBytes, p.head_dim, p.vectors, lane);
  copy_row<kBytes>(static_cast<const char*>(p.v.data) + from_v * kBytes,
                   static_cast<char*>(const_cast<void*>(p.v_pages.data)) + to_v * kBytes, p.head_dim_v, p.vectors,
                   lane);
}

}  // namespace kvk::device
