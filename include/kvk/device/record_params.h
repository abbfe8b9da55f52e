// Matrices of numbers and their records, as the kernels that make and read records walk them; for the launch code and the kernels.
#pragma once

#include "kvk/device/hadamard_params.h"

namespace kvk::device {

// Where a matrix's codes, scales or records lie, in bytes; pages of a pool of records, or matrices one after another.
struct PackedView {
  void* data;
  int64_t page_stride, head_stride;
};

// A list of pages; without one, matrices are counted.
struct PageIds {
  const int32_t* ids;  // null: none
  int64_t stride;
  int64_t num_pages;  // ids beyond it are not touched

  // Page i of the list; -1 if no pool has it.
  KVK_HOST_DEVICE int64_t page(int64_t i) const {
    if (ids == nullptr) return i;
    const int64_t page = ids[i * stride];
    return page < num_pages ? page : -1;
  }
};

// Matrices [tokens, dim]: K or V of (page, kv head), or those of a tensor [.., tokens, dim].
struct RecordMatrices {
  void* x;  // read by what makes records, written by what reads them
  RowGrid x_matrices;
  int64_t token_stride;           // elements
  PageIds x_pages, packed_pages;  // of the first dimension of x_matrices, and of the packed views
  int64_t num_matrices, num_heads;
  int64_t tokens, dim;
  float rotate_scale;  // 1 / sqrt(dim)
  bool vectors;        // every row of x starts on a multiple of 16 bytes
};

// One of them: where it is on both sides.
struct RecordMatrix {
  int64_t outer, head;  // of x_matrices
  int64_t x_page, packed_page;
  int64_t x_offset;  // elements

  KVK_HOST_DEVICE RecordMatrix(const RecordMatrices& p, int64_t index)
      : outer(index / p.num_heads), head(index % p.num_heads), x_page(p.x_pages.page(outer)),
        packed_page(p.packed_pages.page(outer)),
        x_offset(p.x_pages.ids ? x_page * p.x_matrices.stride[0] + head * p.x_matrices.stride[1]
                               : p.x_matrices.offset(index)) {}

  // False: a page id that no pool has. Nothing is read or written for it.
  KVK_HOST_DEVICE bool inside() const { return x_page >= 0 && packed_page >= 0; }
  KVK_HOST_DEVICE uint8_t* packed(const PackedView& view) const {
    return static_cast<uint8_t*>(view.data) + packed_page * view.page_stride + head * view.head_stride;
  }
};

}  // namespace kvk::device
