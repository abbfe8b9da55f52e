// Keys and values that lie in memory as rows of T: how a block of them is packed into fp32 panels for the matrix product,
// wherever a schedule found the rows. What every uncompressed format shares.
#pragma once

#include <algorithm>

#include "cpu/engine/gemm.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// f(min(4, rows)) as a constant: kernels of one to four query rows.
template <class F>
inline void with_rows(int rows, F&& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

// A row of a head dim into fp32.
template <class T>
inline void unpack_row(const T* from, int dim, float* to) {
  int d = 0;
  for (; d + W <= dim; d += W) store(load(from + d), to + d);
  if constexpr (W > 8) {
    if (d < dim) store(load_half(from + d), to + d);
  }
}

inline void unpack_row(const void* from, DType dtype, int dim, float* to) {
  with_dtype(dtype, [&](auto element) { unpack_row(static_cast<const decltype(element)*>(from), dim, to); });
}

// Element `index` of an array of a dtype known at run time.
inline char* element_at(void* data, int64_t index, DType dtype) {
  return static_cast<char*>(data) + index * element_size(dtype);
}
inline const char* element_at(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}

// Columns of B are rows of memory: panel[j / kPanelWidth][d][j % kPanelWidth] = rows[j][first + d]. Columns past the last
// row repeat it.
template <class T>
inline void pack_transposed(const T* const* rows, int count, int64_t first, int dim, float* panels) {
  const int64_t stride = int64_t{dim} * kPanelWidth;
  for (int j = 0; j < count; j += 8) {
    const T* from[8];
    for (int e = 0; e < 8; ++e) from[e] = rows[std::min(j + e, count - 1)] + first;
    float* panel = panels + j / kPanelWidth * stride + j % kPanelWidth;
    for (int d = 0; d < dim; d += 8) {
      transpose_8x8(from, panel + d * kPanelWidth, kPanelWidth);
      for (const T*& row : from) row += 8;
    }
  }
}

// Rows of B are rows of memory: panel[c / kPanelWidth][j][c % kPanelWidth] = rows[j][first + c]. Columns past dim are 0.
template <class T>
inline void pack_rows(const T* const* rows, int count, int64_t first, int dim, float* panels) {
  const auto offset = [](int c) { return int64_t{c / kPanelWidth} * kValuePanel + c % kPanelWidth; };
  // Row by row: walking one column of all rows would meet the same cache set at each of them.
  for (int j = 0; j < count; ++j) {
    const T* row = rows[j] + first;
    float* to = panels + j * kPanelWidth;
    int c = 0;
    for (; c + W <= dim; c += W) store(load(row + c), to + offset(c));
    if constexpr (W > 8) {
      if (c < dim) {
        store(load_half(row + c), to + offset(c));
        c += W;
      }
    }
    if (c % kPanelWidth != 0) store(V(0.0f), to + offset(c));
  }
}

// Whether no element is NaN or infinite.
template <class T>
inline bool finite_rows(const T* const* rows, int count, int64_t first, int dim) {
  V nan = 0.0f;  // x * 0 is NaN for infinities and NaN, else 0
  for (int j = 0; j < count; ++j) {
    const T* row = rows[j] + first;
    int d = 0;
    for (; d + W <= dim; d += W) nan += load(row + d) * 0.0f;
    if constexpr (W > 8) {
      if (d < dim) nan += load_half(row + d) * 0.0f;
    }
  }
  return stdx::all_of(nan == 0.0f);
}

// The panel half of a format over such rows; what derives from it adds locate().
template <class T>
class RowFormat {
 public:
  // Where the keys of one block lie, at head 0.
  struct Rows {
    const T* k[kBlockKeys];
    const T* v[kBlockKeys];
    int count = 0;
  };

  RowFormat(int64_t k_head_stride, int64_t v_head_stride, int head_dim, int head_dim_v)
      : k_head_stride_(k_head_stride), v_head_stride_(v_head_stride), head_dim_(head_dim), head_dim_v_(head_dim_v) {}

  bool finite_v(const Rows& rows, int head) const {
    return finite_rows(rows.v, rows.count, head * v_head_stride_, head_dim_v_);
  }
  float v_element(const Rows& rows, int head, int key, int d) const {
    return to_float(rows.v[key][head * v_head_stride_ + d]);
  }
  void pack_k(const Rows& rows, int head, float* panels) const {
    pack_transposed(rows.k, rows.count, head * k_head_stride_, head_dim_, panels);
  }
  void pack_v(const Rows& rows, int head, float* panels) const {
    pack_rows(rows.v, rows.count, head * v_head_stride_, head_dim_v_, panels);
  }

 protected:
  int64_t k_head_stride_, v_head_stride_;
  int head_dim_, head_dim_v_;
};

}  // namespace kvk::cpu::KVK_LEVEL
