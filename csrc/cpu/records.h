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

// The rows that for_each_record() over these dense pages comes to after (i, head, is V), where they lie as the present ones do;
// else null.
inline const void* rows_ahead(const Tensor& src, const Tensor& k_pages, const Tensor& v_pages, int64_t i, int64_t head,
                              bool is_v) {
  const Tensor& pages = is_v ? v_pages : k_pages;
  if (head + 1 < pages.shape[2]) return dense_at(pages, id_at(src, i), head + 1);
  const Tensor& next = is_v ? k_pages : v_pages;
  if (is_v && ++i == src.shape[0]) return nullptr;
  if (next.stride[1] != pages.stride[1] || next.shape[3] != pages.shape[3]) return nullptr;
  return dense_at(next, id_at(src, i), 0);
}

// f(page of the list, head, is V) for all of them, on the threads.
template <class F>
void for_each_record(Threads& threads, int64_t num_pages, int64_t num_heads, const F& f) {
  parallel_ranges(threads, num_pages * num_heads * 2, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / (2 * num_heads), i % num_heads, i / num_heads % 2 == 1);
  });
}

}  // namespace kvk::cpu
