// Bitmap-sparse pages: of every row of keys and values (one token of one head) the same number of elements, in
// self-describing records, one for each page and kv head (Mustafar).
//
// Shapes as in kvk/paged.h; a pool of records is u8 [N, Hkv, record_bytes], one for K and one for V. The bytes, the rule of
// selection and what becomes of zeros, infinities and NaN are in docs/formats.md.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/device/sparse_layout.h"
#include "kvk/paged.h"
#include "kvk/types.h"

namespace kvk {

using device::BitmapLayout;
using device::BitmapPart;

struct BitmapFormat {
  int64_t page_size, head_dim, head_dim_v;
  DType dtype;  // of the kept values: bf16 or f16
  BitmapPart k, v;

  BitmapLayout k_layout() const { return device::bitmap_layout(page_size, head_dim, k); }
  BitmapLayout v_layout() const { return device::bitmap_layout(page_size, head_dim_v, v); }
};

// From the integers that stand for a format in the torch schemas: page_size, head_dim, head_dim_v, dtype (0: bf16, 1: f16), then
// keep and rotate of K and of V. Throws an Error that names `op` and the number that is wrong.
KVK_API BitmapFormat bitmap_format(const char* op, const std::vector<int64_t>& numbers);

struct CompressPagesArgs {
  Tensor k_pages;  // [M, P, Hkv, D], f32 (then rounded) or the format's dtype, any strides with the last one 1
  Tensor v_pages;  // [M, P, Hkv, Dv]
  Tensor src;      // int32 [n]: dense pages, all P tokens of each
  Tensor k_pool;   // u8 [N, Hkv, k record bytes], written
  Tensor v_pool;   // u8 [N, Hkv, v record bytes], written
  Tensor dst;      // int32 [n]: the records' pages, all different
  BitmapFormat format;
  // Which elements are kept, where magnitude shall not decide; page i is that of src[i]. Last stride 1, others any.
  //   f32 [n, P, Hkv, D]      scores: the largest
  //   bool [n, P, Hkv, D]     these, at most `keep` of a row
  //   u8 [n, P, Hkv, D / 8]   these, as bitmaps
  std::optional<Tensor> k_select = {}, v_select = {};
};

struct DecompressPagesArgs {
  Tensor k_pool;  // u8 [N, Hkv, k record bytes]
  Tensor v_pool;  // u8 [N, Hkv, v record bytes]
  Tensor ids;     // int32 [n]
  BitmapFormat format;
  Tensor k;  // [n, P, Hkv, D], the format's dtype, last stride 1, written
  Tensor v;  // [n, P, Hkv, Dv], written
};

// Attention over records and dense pages mixed: page_indices hold page | tag << 28, tag 0 a page of k_pool and v_pool, tag 1 a
// page of k_pages and v_pages. key_bias has the rows of the records first, then those of the dense pages: [N + M, P].
struct SparseDecodeArgs {
  Tensor q;                       // [B, Hq, D], f32 or the format's dtype, last stride 1
  Tensor k_pool;                  // u8 [N, Hkv, k record bytes]
  Tensor v_pool;                  // u8 [N, Hkv, v record bytes]
  std::optional<Tensor> k_pages;  // [M, P, Hkv, D], q's dtype, any strides with the last one 1; both or none
  std::optional<Tensor> v_pages;  // [M, P, Hkv, Dv]
  PageTable table;
  ScoreOptions score;
  BitmapFormat format;
  Tensor out;  // [B, Hq, Dv], q's dtype, written
  Tensor lse;  // f32 [B, Hq], natural log, written
};

struct SparsePrefillArgs {
  Tensor q;          // [T, Hq, D]
  Tensor qo_indptr;  // int32 [B + 1]
  Tensor k_pool, v_pool;
  std::optional<Tensor> k_pages, v_pages;
  PageTable table;
  ScoreOptions score;
  BitmapFormat format;
  bool causal = true;
  std::optional<Tensor> mask_bits;  // as in PagedPrefillArgs
  int64_t mask_width = -1;
  Tensor out;  // [T, Hq, Dv], written
  Tensor lse;  // f32 [T, Hq], written
};

KVK_API void compress_pages(const CompressPagesArgs& args, const Context& context = {});
KVK_API void decompress_pages(const DecompressPagesArgs& args, const Context& context = {});
KVK_API void sparse_decode(const SparseDecodeArgs& args, const Context& context = {});
KVK_API void sparse_prefill(const SparsePrefillArgs& args, const Context& context = {});

}  // namespace kvk
