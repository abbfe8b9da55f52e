// Walking records and dense pages: what the ops that make and read records share.
#pragma once

#include "cpu/parallel.h"
#include "kvk/types.h"

namespace kvk::cpu {

inline uint8_t* record_at(const Tensor& pool, int64_t page, int64_t head) {
  return pool.ptr<uint8_t>() + page * pool.stride[0] + head * pool.stride[1];
}

// Element 0 of (page, head) of dense pages [pages, tokens, heads, dim].
inline void* dense_at(const Tensor& pages, int64_t page, int64_t head) {
  return pages.ptr<char>() + (page * pages.stride[0] + head * pages.stride[2]) * element_size(pages.dtype);
}

// Entry i of a list of page ids.
inline int64_t id_at(const Tensor& ids, int64_t i) { return ids.ptr<const int32_t>()[i * ids.stride[0]]; }

// f(page of the list, head, is V) for all of them, on the threads.
template <class F>
void for_each_record(Threads& threads, int64_t num_pages, int64_t num_heads, const F& f) {
  parallel_ranges(threads, num_pages * num_heads * 2, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / (2 * num_heads), i % num_heads, i / num_heads % 2 == 1);
  });
}

}  // namespace kvk::cpu
