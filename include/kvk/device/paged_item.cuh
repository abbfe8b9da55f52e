// What decode and prefill share: the keys and query rows of a block's work, where each key lies, what each row sees.
#pragma once

#include "kvk/device/paged_problem.h"
#include "kvk/device/ptx.h"
#include "kvk/device/score.cuh"
#include "kvk/device/types.h"

namespace kvk::device {

// Where one key of a tile lies.
struct KeyPlace {
  int64_t k = 0, v = 0;  // element offsets of its row
  float bias = 0.0f;
  bool visible = false;  // a hidden key is not read: zeros stand in for it
};

// Which slot of which page; the page as its list names it.
struct KeySlot {
  int64_t page, slot;
};

// The work of one block: keys [begin, end) of a request, one kv head, and some of its query rows. Rows are ordered (token,
// head of the group).
template <uint32_t kParts>
struct PagedItem {
  int32_t request, kv_head;
  int32_t first_row, rows;  // rows [first_row, first_row + rows) of the request
  int32_t num_tokens;
  int32_t len, begin, end;  // keys of the request; keys [begin, end) of this split
  int64_t token;            // first row of q of the request
  const int32_t* pages;

  KVK_DEVICE int32_t token_of(const PagedProblem& p, int row) const { return (first_row + row) / p.group; }
  KVK_DEVICE int64_t head_of(const PagedProblem& p, int row) const {
    return int64_t{kv_head} * p.group + (first_row + row) % p.group;
  }

  KVK_DEVICE KeySlot slot(const PagedProblem& p, int32_t key) const {
    const uint32_t page_size = static_cast<uint32_t>(p.page_size);
    const uint32_t index = static_cast<uint32_t>(key) / page_size;
    return {pages[index * p.list.index_stride], static_cast<uint32_t>(key) - index * page_size};
  }
  KVK_DEVICE float bias(const PagedProblem& p, int64_t row, int64_t slot) const {
    return p.key_bias[row * p.bias_page_stride + slot * p.bias_token_stride + kv_head * p.bias_head_stride];
  }
};

// What one query row sees.
template <uint32_t kParts>
struct RowMask {
  int32_t query = 0, low = 0, high = 0;  // the query's position; keys [low, high) as far as causality and window go
  int32_t bits_from = 0;                 // first key of the mask bits
  const uint32_t* bits = nullptr;
  float slope = 0.0f;

  RowMask() = default;
  KVK_DEVICE RowMask(const PagedProblem& p, const PagedItem<kParts>& item, int row) {
    const int32_t token = item.token_of(p, row);
    query = item.len - item.num_tokens + token;
    low = p.window_left >= 0 && query > p.window_left ? static_cast<int32_t>(query - p.window_left) : 0;
    high = p.causal ? query + 1 : item.len;
    if constexpr (kParts & kAlibi) slope = p.alibi_slopes[item.head_of(p, row) * p.alibi_stride];
    if constexpr (kParts & kMaskBits) {
      bits = p.mask_bits + (item.token + token) * p.mask_token_stride;
      bits_from = static_cast<int32_t>(item.len - (p.mask_width >= 0 ? p.mask_width : item.num_tokens));
    }
  }

  KVK_DEVICE int32_t distance(int32_t key) const { return query > key ? query - key : key - query; }

  KVK_DEVICE bool sees(const PagedProblem& p, int32_t key) const {
    if (key < low || key >= high) return false;
    if constexpr (kParts & kMaskBits) {
      const int32_t bit = key - bits_from;
      if (bit >= 0) return bits[bit / 32 * p.mask_word_stride] >> (bit % 32) & 1;
    }
    return true;
  }
};

// Rows of q as the format rotates them, in two terms of the element type, and as they are: [3][kTileRows][kPitch]; zeros
// behind item.rows.
template <class Config, int kTileRows, class Params>
KVK_DEVICE void load_rotated_queries(const Params& params, const PagedItem<Config::kParts>& item,
                                     typename Config::T* queries, float* scratch) {
  using T = typename Config::T;
  constexpr int kLanes = Config::kHeadDim / 8, kRows = 32 / kLanes, kTerm = kTileRows * Config::kPitch;
  const PagedProblem& p = params.problem;
  const int lane = threadIdx.x % 32, unit = lane % kLanes;
  for (int base = static_cast<int>(threadIdx.x) / 32 * kRows; base < kTileRows; base += Config::kWarps * kRows) {
    const int row = base + lane / kLanes;
    const bool valid = lane < kRows * kLanes && row < kTileRows;
    Words<4> words = {};
    if (valid && row < item.rows) {
      words = load_words<4>(static_cast<const T*>(p.q.data) + (item.token + item.token_of(p, row)) * p.q.token_stride +
                            item.head_of(p, row) * p.q.head_stride + unit * 8);
    }
    float x[8];
    unpack<T>(words, x);
    Config::Pages::template rotate_query<Config>(params, x, scratch);
    if (!valid) continue;
    T* to = queries + row * Config::kPitch + unit * 8;
    store_words(to + 2 * kTerm, words);
    KVK_UNROLL
    for (int term = 0; term < 2; ++term) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        words.w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
        const float2 rounded = unpack2<T>(words.w[i]);
        x[2 * i] -= rounded.x;
        x[2 * i + 1] -= rounded.y;
      }
      store_words(to + term * kTerm, words);
    }
    if (Config::kHeadDim % 16 != 0 && unit == kLanes - 1) {  // padding
      KVK_UNROLL
      for (int term = 0; term < 3; ++term) store_words<4>(to + term * kTerm + 8, {});
    }
  }
}

}  // namespace kvk::device
