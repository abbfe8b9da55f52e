// The checked problem of paged attention, as the host code names it.
#pragma once

#include "kvk/device/paged_problem.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"

namespace kvk {

using device::PageList;
using device::PoolView;
using device::RowsView;

// A page reference of the ops over compressed pages: page | tag << 28. Tag 0 names a record, 1 a dense page.
struct PageReference {
  int64_t page;
  int32_t tag;

  explicit PageReference(int64_t reference)
      : page(reference & 0x0fffffff), tag(static_cast<int32_t>(reference >> 28)) {}
};

// Pools of records. Page references then carry a tag; dense pages lie in the problem's k and v.
struct RecordPools {
  const uint8_t* k;
  const uint8_t* v;
  int64_t k_page_stride, k_head_stride, v_page_stride, v_head_stride;  // bytes
  int64_t num_pages;  // records come first in key_bias, then dense pages
};

struct QuantPools : RecordPools {
  QuantFormat format;
};
struct BitmapPools : RecordPools {
  BitmapFormat format;
};

// The kernels get their element type as a template argument, the host code as a value.
struct PagedProblem : device::PagedProblem {
  DType dtype;
  const RecordPools* records = nullptr;  // null: all pages are dense; else one of these, by the format
  const QuantPools* quant = nullptr;
  const BitmapPools* bitmap = nullptr;
  int64_t num_pages = 0;         // of the pool; with records, theirs
  int64_t num_dense_pages = -1;  // beside records; -1: page references carry no tag
  int64_t mask_words = -1;       // of a row of mask_bits; -1: no mask

  // The row of key_bias that a page reference means.
  int64_t bias_row(int64_t reference) const {
    if (records == nullptr) return reference;
    const PageReference page(reference);
    return page.page + (page.tag == 0 ? 0 : records->num_pages);
  }
};

}  // namespace kvk
