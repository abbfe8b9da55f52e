// torch.ops.kvk: attention over records of bitmaps and dense pages.
#include <tuple>
#include <vector>

#include "kvk/sparse.h"
#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;
using Numbers = std::vector<int64_t>;

void sparse_decode_out(TorchTensor q, TorchTensor k_pool, TorchTensor v_pool, TorchTensor page_indices,
                       TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages, MaybeTensor v_pages,
                       MaybeTensor page_indptr, std::optional<double> softmax_scale, int64_t window_left,
                       double logits_soft_cap, MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias,
                       TorchTensor out, TorchTensor lse) {
  sparse_decode({view(q),
                 view(k_pool),
                 view(v_pool),
                 view(k_pages),
                 view(v_pages),
                 {view(page_indices), view(page_indptr), view(kv_lens)},
                 score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                 bitmap_format("sparse_decode", fmt),
                 view(out),
                 view(lse)},
                TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> sparse_decode_new(
    TorchTensor q, TorchTensor k_pool, TorchTensor v_pool, TorchTensor page_indices, TorchTensor kv_lens, Numbers fmt,
    MaybeTensor k_pages, MaybeTensor v_pages, MaybeTensor page_indptr, std::optional<double> softmax_scale,
    int64_t window_left, double logits_soft_cap, MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias) {
  const BitmapFormat format = bitmap_format("sparse_decode", fmt);
  require_rank("sparse_decode", q, "q", 3, "[B, Hq, D]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), format.head_dim_v}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  sparse_decode_out(q, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages, v_pages, page_indptr, softmax_scale,
                    window_left, logits_soft_cap, alibi_slopes, sinks, key_bias, out, lse);
  return {out, lse};
}

void sparse_prefill_out(TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pool, TorchTensor v_pool,
                        TorchTensor page_indices, TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages,
                        MaybeTensor v_pages, MaybeTensor page_indptr, bool causal, std::optional<double> softmax_scale,
                        int64_t window_left, double logits_soft_cap, MaybeTensor alibi_slopes, MaybeTensor sinks,
                        MaybeTensor key_bias, MaybeTensor mask_bits, int64_t mask_width, TorchTensor out,
                        TorchTensor lse) {
  sparse_prefill({view(q),
                  view(qo_indptr),
                  view(k_pool),
                  view(v_pool),
                  view(k_pages),
                  view(v_pages),
                  {view(page_indices), view(page_indptr), view(kv_lens)},
                  score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                  bitmap_format("sparse_prefill", fmt),
                  causal,
                  view(mask_bits),
                  mask_width,
                  view(out),
                  view(lse)},
                 TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> sparse_prefill_new(
    TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pool, TorchTensor v_pool, TorchTensor page_indices,
    TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages, MaybeTensor v_pages, MaybeTensor page_indptr, bool causal,
    std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap, MaybeTensor alibi_slopes,
    MaybeTensor sinks, MaybeTensor key_bias, MaybeTensor mask_bits, int64_t mask_width) {
  const BitmapFormat format = bitmap_format("sparse_prefill", fmt);
  require_rank("sparse_prefill", q, "q", 3, "[T, Hq, D]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), format.head_dim_v}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  sparse_prefill_out(q, qo_indptr, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages, v_pages, page_indptr, causal,
                     softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias, mask_bits, mask_width,
                     out, lse);
  return {out, lse};
}

#define KVK_SPARSE_POOLS                                                                                    \
  "Tensor k_pool, Tensor v_pool, Tensor page_indices, Tensor kv_lens, int[] fmt, *, Tensor? k_pages=None, " \
  "Tensor? v_pages=None, Tensor? page_indptr=None, "
#define KVK_SPARSE_DECODE_SCHEMA "Tensor q, " KVK_SPARSE_POOLS KVK_SCORE_SCHEMA
#define KVK_SPARSE_PREFILL_SCHEMA                                                       \
  "Tensor q, Tensor qo_indptr, " KVK_SPARSE_POOLS "bool causal=True, " KVK_SCORE_SCHEMA \
  ", Tensor? mask_bits=None, int mask_width=-1"

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("sparse_decode(" KVK_SPARSE_DECODE_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("sparse_decode.out(" KVK_SPARSE_DECODE_SCHEMA KVK_OUT_SCHEMA);
  m.def("sparse_prefill(" KVK_SPARSE_PREFILL_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("sparse_prefill.out(" KVK_SPARSE_PREFILL_SCHEMA KVK_OUT_SCHEMA);
}

#define KVK_SPARSE_ATTENTION_IMPLS(m)                         \
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode_new));     \
  m.impl("sparse_decode.out", TORCH_BOX(&sparse_decode_out)); \
  m.impl("sparse_prefill", TORCH_BOX(&sparse_prefill_new));   \
  m.impl("sparse_prefill.out", TORCH_BOX(&sparse_prefill_out))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_SPARSE_ATTENTION_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_SPARSE_ATTENTION_IMPLS(m); }

}  // namespace kvk::torch_face
