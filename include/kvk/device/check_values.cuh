// Checks values that only the card can read, and names the first bad one, with the rules and in the order of the CPU's
// checks (csrc/core/paged_check.cc). For debugging: one block, bound by the latency of its loads.
// Tile: one warp a list of pages, one thread a start or a slot.
#pragma once

#include "kvk/device/check_values_params.h"
#include "kvk/device/lang.h"

namespace kvk::device {

inline constexpr uint64_t kAllGood = ~uint64_t{0};

// The least of the block's keys, in every thread. A key says where a bad value is; the first one has the least.
template <int kThreads>
KVK_DEVICE uint64_t block_min(uint64_t key) {
  KVK_SHARED(keys, uint64_t[kThreads / 32]);
  KVK_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, key, step);
    key = other < key ? other : key;
  }
  __syncthreads();  // the keys of an earlier call have been read
  if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = key;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) key = keys[warp] < key ? keys[warp] : key;
  return key;
}

// Starts of consecutive runs: from 0, never decreasing, within `limit`.
template <int kThreads>
KVK_DEVICE bool good_starts(const int32_t* starts, int64_t stride, int64_t count, int64_t limit, bool of_queries,
                            BadValue* found) {
  uint64_t first = kAllGood;
  for (int64_t i = threadIdx.x; i < count && first == kAllGood; i += kThreads) {
    const int32_t start = starts[i * stride];
    if (i == 0 ? start != 0 : start < starts[(i - 1) * stride]) first = static_cast<uint64_t>(i);
  }
  const int64_t last = starts[(count - 1) * stride];
  if (first == kAllGood && last > limit) first = static_cast<uint64_t>(count);
  first = block_min<kThreads>(first);
  if (first == kAllGood) return true;
  if (threadIdx.x == 0) {
    const int64_t at = static_cast<int64_t>(first);
    BadValue bad;
    bad.kind = at == count ? BadValue::kLastStart : at == 0 ? BadValue::kFirstStart : BadValue::kDecreasingStart;
    bad.of_queries = of_queries;
    bad.index = at;
    bad.value = at == count ? last : starts[at * stride];
    bad.other = bad.kind == BadValue::kDecreasingStart ? starts[(at - 1) * stride] : 0;
    *found = bad;
  }
  return false;
}

// Pages that the list of a request and kv head names.
KVK_DEVICE int64_t list_capacity(const CheckTableParams& p, int64_t request, int64_t head) {
  const PageList& list = p.problem.list;
  if (list.indptr == nullptr) return p.list_entries;
  const int64_t row = list.per_head_list ? request * list.num_kv_heads + head : request;
  return int64_t{list.indptr[(row + 1) * list.indptr_stride]} - list.indptr[row * list.indptr_stride];
}

// What is wrong with an entry of a page table: kNone, or the kind, with `value` what is named.
struct PageVerdict {
  BadValue::Kind kind;
  int64_t value;
};
KVK_DEVICE PageVerdict judge_page(const CheckTableParams& p, int64_t entry) {
  int64_t page = entry;
  if (p.num_dense_pages >= 0 && entry >= 0) {
    const int64_t tag = entry >> 28;
    page = entry & 0x0fffffff;
    if (tag > 1) return {BadValue::kTag, tag};
    if (tag == 1) return {page < p.num_dense_pages ? BadValue::kNone : BadValue::kDensePage, page};
  }
  return {page >= 0 && page < p.num_pages ? BadValue::kNone : BadValue::kPage, page};
}

// Lengths, and the pages in use. The starts must be good.
template <int kThreads>
KVK_DEVICE bool good_lists(const CheckTableParams& p) {
  const PageList& list = p.problem.list;
  const int64_t page_size = p.problem.page_size;
  const int64_t lists = list.per_head() ? list.num_kv_heads : 1;  // of one request
  // The list's number, and then 0 for its length or 1 + the place of a page: a list has fewer than 2^32 - 1.
  uint64_t first = kAllGood;
  for (int64_t row = threadIdx.x / 32; row < p.problem.num_requests * lists && first == kAllGood;
       row += kThreads / 32) {
    const int64_t request = row / lists, head = row % lists;
    const int64_t len = list.len(request, head);
    if (len < 0 || len > list_capacity(p, request, head) * page_size) {
      first = static_cast<uint64_t>(row) << 32;
      continue;
    }
    const int32_t* pages = list.pages(request, head);
    for (int64_t i = threadIdx.x % 32; i < ceil_div(len, page_size) && first == kAllGood; i += 32) {
      if (judge_page(p, pages[i * list.index_stride]).kind != BadValue::kNone)
        first = static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(i + 1);
    }
  }
  first = block_min<kThreads>(first);
  if (first == kAllGood) return true;
  if (threadIdx.x == 0) {
    const int64_t row = static_cast<int64_t>(first >> 32), place = static_cast<int64_t>(first & 0xffffffffu);
    const int64_t request = row / lists, head = row % lists;
    BadValue bad;
    bad.index = request;
    if (place > 0) {
      bad.entry = place - 1;
      const PageVerdict verdict = judge_page(p, list.pages(request, head)[bad.entry * list.index_stride]);
      bad.kind = verdict.kind;
      bad.value = verdict.value;
    } else {
      bad.value = list.len(request, head);
      bad.kind = bad.value < 0 ? BadValue::kNegativeLen : BadValue::kLenPastList;
      bad.other = list_capacity(p, request, head);
    }
    *p.found = bad;
  }
  return false;
}

// The rows of a mask as wide as a request has tokens.
template <int kThreads>
KVK_DEVICE bool good_mask(const CheckTableParams& p) {
  uint64_t first = kAllGood;
  for (int64_t b = threadIdx.x; b < p.problem.num_requests && first == kAllGood; b += kThreads) {
    if (p.problem.num_request_tokens(b) > p.mask_words * 32) first = static_cast<uint64_t>(b);
  }
  first = block_min<kThreads>(first);
  if (first == kAllGood) return true;
  if (threadIdx.x == 0) {
    BadValue bad;
    bad.kind = BadValue::kTokensPastMask;
    bad.index = static_cast<int64_t>(first);
    bad.value = p.problem.num_request_tokens(bad.index);
    *p.found = bad;
  }
  return false;
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_table_kernel(const __grid_constant__ CheckTableParams p) {
  const PagedProblem& problem = p.problem;
  const PageList& list = problem.list;
  if (list.indptr != nullptr) {
    const int64_t lists = int64_t{problem.num_requests} * (list.per_head_list ? list.num_kv_heads : 1);
    if (!good_starts<kThreads>(list.indptr, list.indptr_stride, lists + 1, p.list_entries, false, p.found)) return;
  }
  if (!good_lists<kThreads>(p)) return;
  if (problem.qo_indptr != nullptr) {
    const int64_t count = int64_t{problem.num_requests} + 1;
    if (!good_starts<kThreads>(problem.qo_indptr, problem.qo_indptr_stride, count, problem.num_tokens, true, p.found))
      return;
    if (p.mask_words >= 0 && problem.mask_width == -1 && !good_mask<kThreads>(p)) return;
  }
  if (threadIdx.x == 0) *p.found = BadValue();
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_slots_kernel(const __grid_constant__ CheckSlotsParams p) {
  uint64_t first = kAllGood;
  for (int64_t t = threadIdx.x; t < p.num_tokens && first == kAllGood; t += kThreads) {
    if (p.slots[t * p.slot_stride] >= p.num_slots) first = static_cast<uint64_t>(t);
  }
  first = block_min<kThreads>(first);
  if (threadIdx.x != 0) return;
  BadValue bad;
  if (first != kAllGood) {
    bad.kind = BadValue::kSlot;
    bad.index = static_cast<int64_t>(first);
    bad.value = p.slots[bad.index * p.slot_stride];
  }
  *p.found = bad;
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_ids_kernel(const __grid_constant__ CheckIdsParams p) {
  uint64_t first = kAllGood;
  for (int64_t i = threadIdx.x; i < p.count && first == kAllGood; i += kThreads) {
    const int32_t page = p.ids[i * p.stride];
    if (page < 0 || page >= p.limit) first = static_cast<uint64_t>(i);
  }
  first = block_min<kThreads>(first);
  if (threadIdx.x != 0) return;
  BadValue bad;
  if (first != kAllGood) {
    bad.kind = BadValue::kId;
    bad.index = static_cast<int64_t>(first);
    bad.value = p.ids[bad.index * p.stride];
  }
  *p.found = bad;
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_starts_kernel(const __grid_constant__ CheckIdsParams p) {
  if (!good_starts<kThreads>(p.ids, p.stride, p.count, p.limit, false, p.found)) return;
  if (threadIdx.x == 0) *p.found = BadValue();
}

// What is wrong with the slot of row b: negative ones name none, the others only one each.
KVK_DEVICE BadValue::Kind judge_state_slot(const CheckIdsParams& p, int64_t b) {
  const int32_t slot = p.ids[b * p.stride];
  if (slot >= p.limit) return BadValue::kStateSlot;
  for (int64_t before = 0; slot >= 0 && before < b; ++before) {
    if (p.ids[before * p.stride] == slot) return BadValue::kStateSlotAgain;
  }
  return BadValue::kNone;
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_state_slots_kernel(const __grid_constant__ CheckIdsParams p) {
  uint64_t first = kAllGood;
  for (int64_t b = threadIdx.x; b < p.count && first == kAllGood; b += kThreads) {
    if (judge_state_slot(p, b) != BadValue::kNone) first = static_cast<uint64_t>(b);
  }
  first = block_min<kThreads>(first);
  if (threadIdx.x != 0) return;
  BadValue bad;
  if (first != kAllGood) {
    bad.index = static_cast<int64_t>(first);
    bad.kind = judge_state_slot(p, bad.index);
    bad.value = p.ids[bad.index * p.stride];
  }
  *p.found = bad;
}

// Elements that row `row` of a mask, or of bitmaps, selects.
KVK_DEVICE int64_t count_selected(const CheckSelectParams& p, int64_t row) {
  const int64_t head = row % p.shape[2], token = row / p.shape[2] % p.shape[1], page = row / p.shape[2] / p.shape[1];
  const uint8_t* select = p.select + page * p.stride[0] + token * p.stride[1] + head * p.stride[2];
  int64_t count = 0;
  for (int64_t i = 0; i < p.shape[3]; ++i) count += p.is_bitmap ? __popc(select[i]) : select[i] != 0;
  return count;
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_select_kernel(const __grid_constant__ CheckSelectParams p) {
  uint64_t first = kAllGood;
  const int64_t rows = p.shape[0] * p.shape[1] * p.shape[2];
  for (int64_t row = threadIdx.x; row < rows && first == kAllGood; row += kThreads) {
    if (count_selected(p, row) > p.keep) first = static_cast<uint64_t>(row);
  }
  first = block_min<kThreads>(first);
  if (threadIdx.x != 0) return;
  BadValue bad;
  if (first != kAllGood) {
    bad.kind = BadValue::kSelected;
    bad.index = static_cast<int64_t>(first);
    bad.value = count_selected(p, bad.index);
  }
  *p.found = bad;
}

// The most blocks of `size` tokens that a sequence has, in every thread.
template <int kThreads>
KVK_DEVICE int64_t most_blocks(const PackedSequences& sequences, int32_t size) {
  int64_t most = 0;
  for (int32_t b = threadIdx.x; b < sequences.count; b += kThreads) {
    const int64_t blocks = ceil_div(sequences.len(b), size);
    if (blocks > most) most = blocks;
  }
  return static_cast<int64_t>(~block_min<kThreads>(~static_cast<uint64_t>(most)));
}

// The first thing wrong with the lists of one batch and head: a start, then the end, then a block. 2 bits of what, 31 of where.
KVK_DEVICE uint64_t judge_pattern(const CheckPatternParams& p, int64_t b, int64_t h, int64_t columns) {
  const BlockSparseParams& pattern = p.pattern;
  const int lane = threadIdx.x % 32;
  const auto start = [&](int64_t m) -> int64_t { return *pattern.row_ptr.at(b, h, m); };
  const auto first_of = [](uint64_t key) {
    KVK_UNROLL
    for (int step = 16; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, key, step);
      key = other < key ? other : key;
    }
    return key;
  };
  uint64_t first = kAllGood;
  for (int64_t m = lane; m <= pattern.block_rows && first == kAllGood; m += 32) {
    if (start(m) < (m > 0 ? start(m - 1) : 0)) first = static_cast<uint64_t>(m);
  }
  first = first_of(first);
  if (first != kAllGood) return first;
  const int64_t end = start(pattern.block_rows);
  if (end > pattern.num_entries) return uint64_t{1} << 31;
  for (int64_t e = start(0) + lane; e < end && first == kAllGood; e += 32) {
    const int32_t column = *pattern.col_idx.at(b, h, e);
    if (column < 0 || column >= columns) first = uint64_t{2} << 31 | static_cast<uint64_t>(e);
  }
  return first_of(first);
}

template <int kThreads>
KVK_KERNEL(kThreads, 1)
check_pattern_kernel(const __grid_constant__ CheckPatternParams p) {
  const BlockSparseParams& pattern = p.pattern;
  const int64_t rows = most_blocks<kThreads>(pattern.queries, pattern.block_q);
  const int64_t columns = most_blocks<kThreads>(pattern.keys, pattern.block_k);
  uint64_t first = kAllGood;  // the list's number, and what is wrong with it
  for (int64_t list = threadIdx.x / 32; list < int64_t{p.batches} * p.heads && first == kAllGood;
       list += kThreads / 32) {
    const uint64_t wrong = judge_pattern(p, list / p.heads, list % p.heads, columns);
    if (wrong != kAllGood) first = static_cast<uint64_t>(list) << 33 | wrong;
  }
  first = block_min<kThreads>(first);
  if (threadIdx.x != 0) return;
  BadValue bad;
  if (rows > pattern.block_rows) {
    bad.kind = BadValue::kBlockRows;
    bad.value = rows;
  } else if (first != kAllGood) {
    const int64_t list = static_cast<int64_t>(first >> 33);
    bad.index = list / p.heads;
    bad.head = list % p.heads;
    bad.entry = static_cast<int64_t>(first & 0x7fffffff);
    const uint64_t what = first >> 31 & 3;
    bad.kind = what == 0 ? BadValue::kRowStart : what == 1 ? BadValue::kRowEnd : BadValue::kKeyBlock;
    if (what == 2) {
      bad.value = *pattern.col_idx.at(bad.index, bad.head, bad.entry);
      bad.other = columns;
    } else {
      const int64_t row = what == 1 ? pattern.block_rows : bad.entry;
      bad.value = *pattern.row_ptr.at(bad.index, bad.head, row);
      bad.other = row > 0 ? *pattern.row_ptr.at(bad.index, bad.head, row - 1) : 0;
    }
  }
  *p.found = bad;
}

}  // namespace kvk::device
