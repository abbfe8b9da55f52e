// Schedule: which keys a tile visits, block by block. A schedule yields KeyBlocks; formats turn them into K and V.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/plan.h"

namespace kvk::cpu::KVK_LEVEL {

// Consecutive keys that lie in consecutive slots of one page.
struct Run {
  int64_t page;    // as the page table has it
  int32_t offset;  // slot of the first within the page
  int32_t begin;   // index of the first within the block
  int32_t count;
};

struct KeyBlock {
  int64_t first = 0;  // position of key 0 of the block among the request's keys
  int count = 0;
  int num_runs = 0;
  Run runs[kBlockKeys];
};

// Keys [begin, end) of a page list, in blocks that start at multiples of block_keys.
class PageListSchedule {
 public:
  PageListSchedule(const int32_t* pages, int64_t page_stride, int64_t page_size, int64_t begin, int64_t end,
                   int block_keys)
      : pages_(pages), page_stride_(page_stride), page_size_(page_size), next_(begin), end_(end),
        block_keys_(block_keys) {}

  bool next(KeyBlock& block) {
    if (next_ >= end_) return false;
    const int64_t stop = std::min(end_, (next_ / block_keys_ + 1) * block_keys_);
    block.first = next_;
    block.count = static_cast<int>(stop - next_);
    block.num_runs = 0;
    int64_t page = next_ / page_size_, offset = next_ % page_size_;
    for (int done = 0; done < block.count; ++page, offset = 0) {
      const int count = static_cast<int>(std::min<int64_t>(block.count - done, page_size_ - offset));
      block.runs[block.num_runs++] = {pages_[page * page_stride_], static_cast<int32_t>(offset), done, count};
      done += count;
    }
    next_ = stop;
    return true;
  }

 private:
  const int32_t* pages_;
  int64_t page_stride_, page_size_, next_, end_;
  int block_keys_;
};

}  // namespace kvk::cpu::KVK_LEVEL
