// Whose page is whose: what the host of an engine keeps of a paged KV cache. Full pages become records, the page that a request
// is filling stays dense.
#pragma once

#include <kvk/kvk.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace engine {

inline constexpr int32_t kDense = 1 << 28;  // tag of a page reference: a dense page (docs/formats.md)

// A contiguous view.
inline kvk::Tensor view(void* data, kvk::DType dtype, kvk::Device device, std::initializer_list<int64_t> shape) {
  kvk::Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.device = device;
  t.ndim = static_cast<int32_t>(shape.size());
  int64_t step = 1, i = t.ndim;
  for (const int64_t size : shape) t.shape[t.ndim - i--] = size;
  for (i = t.ndim - 1; i >= 0; step *= t.shape[i--]) t.stride[i] = step;
  return t;
}

// Numbers of free pages.
class FreeList {
 public:
  explicit FreeList(int32_t count) {
    for (int32_t i = count; i-- > 0;) free_.push_back(i);
  }
  int32_t take() {
    if (free_.empty()) throw std::runtime_error("the cache is full");
    const int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  void give(int32_t page) { free_.push_back(page); }

 private:
  std::vector<int32_t> free_;
};

// Which pages each request has. What the device needs of it (slots, pages to pack, tables) is made a step at a time.
class PageTables {
 public:
  PageTables(int64_t page_size, int32_t num_requests, int32_t num_dense, int32_t num_records)
      : page_size_(page_size), dense_(num_dense), records_(num_records), pages_(static_cast<size_t>(num_requests)),
        lens_(static_cast<size_t>(num_requests)) {}

  // A place for one more token of the first `running` requests: slots for append_kv, which skips the others.
  std::vector<int64_t> next_slots(size_t running) {
    std::vector<int64_t> slots(lens_.size(), -1);
    for (size_t r = 0; r < running; ++r) {
      if (lens_[r] % page_size_ == 0) pages_[r].push_back(dense_.take() | kDense);
      slots[r] = (pages_[r].back() & ~kDense) * page_size_ + lens_[r] % page_size_;
      ++lens_[r];
    }
    return slots;
  }

  // The dense pages that the last token filled, and the records that they become; their requests refer to those from now on.
  struct Full {
    std::vector<int32_t> from, to;
  };
  Full pack_full_pages() {
    Full full;
    for (size_t r = 0; r < lens_.size(); ++r) {
      if (lens_[r] == 0 || lens_[r] % page_size_ != 0 || pages_[r].back() < kDense) continue;
      full.from.push_back(pages_[r].back() & ~kDense);
      full.to.push_back(records_.take());
      pages_[r].back() = full.to.back();
    }
    return full;
  }
  // When they are queued, their dense pages are free for what is queued later.
  void packed(const std::vector<int32_t>& from) {
    for (const int32_t page : from) dense_.give(page);
  }

  const std::vector<int32_t>& lens() const { return lens_; }
  // [requests, max_pages()], rows padded with 0, which is not read.
  std::vector<int32_t> table() const {
    std::vector<int32_t> table(pages_.size() * max_pages());
    for (size_t r = 0; r < pages_.size(); ++r) {
      for (size_t i = 0; i < pages_[r].size(); ++i) table[r * max_pages() + i] = pages_[r][i];
    }
    return table;
  }
  size_t max_pages() const {
    size_t most = 1;
    for (const auto& list : pages_) most = most < list.size() ? list.size() : most;
    return most;
  }

 private:
  int64_t page_size_;
  FreeList dense_, records_;
  std::vector<std::vector<int32_t>> pages_;
  std::vector<int32_t> lens_;
};

}  // namespace engine
