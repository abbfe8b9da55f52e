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

// int32 [groups of heads, channels]: stored channel i of a group's rows is channel(group, i) of the rotated ones.
struct Permutation {
  const int32_t* channels = nullptr;  // null: as they are
  int64_t group_stride = 0, stride = 0;

  int64_t channel(int64_t group, int64_t i) const { return channels[group * group_stride + i * stride]; }
};

// f32 [positions, dim]: cosines, then sines, of dim / 2 angles.
struct Rope {
  const float* values = nullptr;  // null: keys are stored with theirs
  int64_t stride = 0;
  int32_t dim = 0;
};

struct QuantPools : RecordPools {
  QuantFormat format;
  Permutation permutation;
  Rope rope;

  // Whether heads cannot be read one by one, in the basis they are stored in.
  bool restored() const {
    return format.k.rotate > 1 || format.v.rotate > 1 || permutation.channels != nullptr || rope.values != nullptr;
  }
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
  int32_t joint_heads = 1;       // kv heads that are restored together
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
