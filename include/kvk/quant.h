// Quantized pages: keys and values of 2, 3, 4 or 8 bits in self-describing records, one for each page and kv head.
//
// Shapes as in kvk/paged.h; a pool of records is u8 [N, Hkv, record_bytes], one for K and one for V. The bytes, the rounding
// and what becomes of zeros, constants, infinities and NaN are in docs/formats.md.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/device/quant_layout.h"
#include "kvk/paged.h"
#include "kvk/types.h"

namespace kvk {

using device::QuantLayout;
using device::QuantPart;

struct QuantFormat {
  int64_t page_size, head_dim, head_dim_v;
  QuantPart k, v;

  QuantLayout k_layout() const { return device::quant_layout(page_size, head_dim, k); }
  QuantLayout v_layout() const { return device::quant_layout(page_size, head_dim_v, v); }
};

// From the integers that stand for a format in the torch schemas: page_size, head_dim, head_dim_v, then bits, group, axis
// (0: channel, 1: token) and rotate of K and of V. Throws an Error that names `op` and the number that is wrong.
KVK_API QuantFormat quant_format(const char* op, const std::vector<int64_t>& numbers);

struct QuantizePagesArgs {
  Tensor k_pages;  // [M, P, Hkv, D], f32 | bf16 | f16, any strides with the last one 1
  Tensor v_pages;  // [M, P, Hkv, Dv]
  Tensor src;      // int32 [n]: dense pages, all P tokens of each
  Tensor k_pool;   // u8 [N, Hkv, k record bytes], written
  Tensor v_pool;   // u8 [N, Hkv, v record bytes], written
  Tensor dst;      // int32 [n]: the records' pages, all different
  QuantFormat format;
  double k_clip = 1.0, v_clip = 1.0;  // (0, 1]: smallest and largest element of a group are multiplied by it first
  std::optional<Tensor> k_permutation =
      {};  // int32 [Hkv / m, m * D], m the heads of format.k.rotate: stored channel i of
           // a group of heads is channel k_permutation[group][i] of their rotated row
};

struct DequantizePagesArgs {
  Tensor k_pool;  // u8 [N, Hkv, k record bytes]
  Tensor v_pool;  // u8 [N, Hkv, v record bytes]
  Tensor ids;     // int32 [n]
  QuantFormat format;
  Tensor k;                                  // [n, P, Hkv, D], f32 | bf16 | f16, last stride 1, written
  Tensor v;                                  // [n, P, Hkv, Dv], k's dtype, written
  std::optional<Tensor> k_permutation = {};  // as in QuantizePagesArgs
};

// The same numbers for any tensor, without pages: T rows of n elements, groups along rows (channel) or within them (token).
struct QuantizeArgs {
  Tensor x;  // [..., T, n] or [n], f32 | bf16 | f16, any leading strides, last stride 1; n a multiple of 8
  QuantPart part;
  double clip = 1.0;
  Tensor codes;  // u8 [..., T, n * bits / 8], contiguous, written
  Tensor scale;  // f16 [..., T / group, n] or [..., T, n / group], contiguous, written
  Tensor min;    // as scale
};

struct DequantizeArgs {
  Tensor codes, scale, min;  // as quantize writes them
  QuantPart part;
  Tensor x;  // [..., T, n], f32 | bf16 | f16, any leading strides, last stride 1, written
};

// Attention over records and dense pages mixed: page_indices hold page | tag << 28, tag 0 a page of k_pool and v_pool, tag 1 a
// page of k_pages and v_pages. key_bias has the rows of the records first, then those of the dense pages: [N + M, P].
struct QuantDecodeArgs {
  Tensor q;                       // [B, Hq, D], f32 | bf16 | f16, last stride 1
  Tensor k_pool;                  // u8 [N, Hkv, k record bytes]
  Tensor v_pool;                  // u8 [N, Hkv, v record bytes]
  std::optional<Tensor> k_pages;  // [M, P, Hkv, D], q's dtype, any strides with the last one 1; both or none
  std::optional<Tensor> v_pages;  // [M, P, Hkv, Dv]
  PageTable table;
  ScoreOptions score;
  QuantFormat format;
  Tensor out;                                // [B, Hq, Dv], q's dtype, written
  Tensor lse;                                // f32 [B, Hq], natural log, written
  std::optional<Tensor> k_permutation = {};  // as in QuantizePagesArgs
  std::optional<Tensor> k_rope =
      {};  // f32 [max_len, R]: cosines, then sines, of R / 2 angles for each position; keys of
           // records and of dense pages are stored before their rotary embedding (half style)
};

struct QuantPrefillArgs {
  Tensor q;          // [T, Hq, D]
  Tensor qo_indptr;  // int32 [B + 1]
  Tensor k_pool, v_pool;
  std::optional<Tensor> k_pages, v_pages;
  PageTable table;
  ScoreOptions score;
  QuantFormat format;
  bool causal = true;
  std::optional<Tensor> mask_bits;  // as in PagedPrefillArgs
  int64_t mask_width = -1;
  Tensor out;                                             // [T, Hq, Dv], written
  Tensor lse;                                             // f32 [T, Hq], written
  std::optional<Tensor> k_permutation = {}, k_rope = {};  // as in QuantDecodeArgs
};

KVK_API void quantize_pages(const QuantizePagesArgs& args, const Context& context = {});
KVK_API void dequantize_pages(const DequantizePagesArgs& args, const Context& context = {});
KVK_API void quant_decode(const QuantDecodeArgs& args, const Context& context = {});
KVK_API void quant_prefill(const QuantPrefillArgs& args, const Context& context = {});
KVK_API void quantize(const QuantizeArgs& args, const Context& context = {});
KVK_API void dequantize(const DequantizeArgs& args, const Context& context = {});

}  // namespace kvk
