// Where a request's keys are split among blocks. It depends on the request alone, so that its result is the same in any
// batch, and the kernels work it out on the card: the host does not know the lengths.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

inline constexpr int32_t kMaxSplits = 64;      // enough to fill a card at batch 1; bounds the partial results
inline constexpr int32_t kMinSplitKeys = 512;  // a partial result then costs under 2% of reading the keys
inline constexpr int32_t kSplitMultiple = 64;

struct Splits {
  int32_t keys_per_split;
  int32_t count;  // at least 1, also without keys
};

KVK_HOST_DEVICE constexpr Splits split_keys(int64_t num_keys) {
  const int64_t share = round_up<int64_t>(ceil_div<int64_t>(num_keys, kMaxSplits), kSplitMultiple);
  const int64_t keys = share > kMinSplitKeys ? share : kMinSplitKeys;
  const int64_t count = ceil_div(num_keys, keys);
  return {static_cast<int32_t>(keys), static_cast<int32_t>(count > 0 ? count : 1)};
}

// Requests of so few query rows per kv head are streamed: split over blocks and read tile by tile of 16 rows, as decode.
// The others go to the prefill kernel, one block for up to 128 rows and all their keys.
inline constexpr int32_t kStreamRows = 16;

KVK_HOST_DEVICE constexpr bool is_streamed(int64_t num_tokens, int32_t group) {
  return num_tokens == 1 || (num_tokens > 0 && num_tokens * group <= kStreamRows);
}

// Query rows per kv head of a streamed request, at most.
KVK_HOST_DEVICE constexpr int32_t max_stream_rows(bool decode, int32_t group) {
  return decode || group > kStreamRows ? group : kStreamRows;
}

// Keys [begin, end) that some token of a request's n may see: the causal limit and the window of its outer tokens.
struct KeyRange {
  int64_t begin, end;
};
KVK_HOST_DEVICE constexpr KeyRange visible_keys(int64_t len, int64_t first_query, int64_t num_tokens, bool causal,
                                                int64_t window_left) {
  const int64_t last = first_query + num_tokens;  // one past the last query's position
  const int64_t end = !causal || last > len ? len : last < 0 ? 0 : last;
  const int64_t low = window_left >= 0 && first_query > window_left ? first_query - window_left : 0;
  return {low < end ? low : end, end};
}

}  // namespace kvk::device
