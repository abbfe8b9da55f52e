// torch.ops.kvk: attention over quantized records and dense pages.
#include <tuple>
#include <vector>

#include "kvk/quant.h"
#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;
using Numbers = std::vector<int64_t>;

void quant_decode_out(TorchTensor q, TorchTensor k_pool, TorchTensor v_pool, TorchTensor page_indices,
                      TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages, MaybeTensor v_pages,
                      MaybeTensor page_indptr, MaybeTensor k_permutation, MaybeTensor k_rope,
                      std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap,
                      MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias, TorchTensor out,
                      TorchTensor lse) {
  quant_decode({view(q),
                view(k_pool),
                view(v_pool),
                view(k_pages),
                view(v_pages),
                {view(page_indices), view(page_indptr), view(kv_lens)},
                score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                quant_format("quant_decode", fmt),
                view(out),
                view(lse),
                view(k_permutation),
                view(k_rope)},
               TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> quant_decode_new(TorchTensor q, TorchTensor k_pool, TorchTensor v_pool,
                                                      TorchTensor page_indices, TorchTensor kv_lens, Numbers fmt,
                                                      MaybeTensor k_pages, MaybeTensor v_pages, MaybeTensor page_indptr,
                                                      MaybeTensor k_permutation, MaybeTensor k_rope,
                                                      std::optional<double> softmax_scale, int64_t window_left,
                                                      double logits_soft_cap, MaybeTensor alibi_slopes,
                                                      MaybeTensor sinks, MaybeTensor key_bias) {
  const QuantFormat format = quant_format("quant_decode", fmt);
  require_rank("quant_decode", q, "q", 3, "[B, Hq, D]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), format.head_dim_v}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  quant_decode_out(q, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages, v_pages, page_indptr, k_permutation, k_rope,
                   softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias, out, lse);
  return {out, lse};
}

void quant_prefill_out(TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pool, TorchTensor v_pool,
                       TorchTensor page_indices, TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages,
                       MaybeTensor v_pages, MaybeTensor page_indptr, MaybeTensor k_permutation, MaybeTensor k_rope,
                       bool causal, std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap,
                       MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias, MaybeTensor mask_bits,
                       int64_t mask_width, TorchTensor out, TorchTensor lse) {
  quant_prefill({view(q),
                 view(qo_indptr),
                 view(k_pool),
                 view(v_pool),
                 view(k_pages),
                 view(v_pages),
                 {view(page_indices), view(page_indptr), view(kv_lens)},
                 score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                 quant_format("quant_prefill", fmt),
                 causal,
                 view(mask_bits),
                 mask_width,
                 view(out),
                 view(lse),
                 view(k_permutation),
                 view(k_rope)},
                TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> quant_prefill_new(
    TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pool, TorchTensor v_pool, TorchTensor page_indices,
    TorchTensor kv_lens, Numbers fmt, MaybeTensor k_pages, MaybeTensor v_pages, MaybeTensor page_indptr,
    MaybeTensor k_permutation, MaybeTensor k_rope, bool causal, std::optional<double> softmax_scale,
    int64_t window_left, double logits_soft_cap, MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias,
    MaybeTensor mask_bits, int64_t mask_width) {
  const QuantFormat format = quant_format("quant_prefill", fmt);
  require_rank("quant_prefill", q, "q", 3, "[T, Hq, D]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), format.head_dim_v}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  quant_prefill_out(q, qo_indptr, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages, v_pages, page_indptr,
                    k_permutation, k_rope, causal, softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks,
                    key_bias, mask_bits, mask_width, out, lse);
  return {out, lse};
}

#define KVK_QUANT_POOLS                                                                                     \
  "Tensor k_pool, Tensor v_pool, Tensor page_indices, Tensor kv_lens, int[] fmt, *, Tensor? k_pages=None, " \
  "Tensor? v_pages=None, Tensor? page_indptr=None, Tensor? k_permutation=None, Tensor? k_rope=None, "
#define KVK_QUANT_DECODE_SCHEMA "Tensor q, " KVK_QUANT_POOLS KVK_SCORE_SCHEMA
#define KVK_QUANT_PREFILL_SCHEMA                                                       \
  "Tensor q, Tensor qo_indptr, " KVK_QUANT_POOLS "bool causal=True, " KVK_SCORE_SCHEMA \
  ", Tensor? mask_bits=None, int mask_width=-1"

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("quant_decode(" KVK_QUANT_DECODE_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("quant_decode.out(" KVK_QUANT_DECODE_SCHEMA KVK_OUT_SCHEMA);
  m.def("quant_prefill(" KVK_QUANT_PREFILL_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("quant_prefill.out(" KVK_QUANT_PREFILL_SCHEMA KVK_OUT_SCHEMA);
}

#define KVK_QUANT_ATTENTION_IMPLS(m)                        \
  m.impl("quant_decode", TORCH_BOX(&quant_decode_new));     \
  m.impl("quant_decode.out", TORCH_BOX(&quant_decode_out)); \
  m.impl("quant_prefill", TORCH_BOX(&quant_prefill_new));   \
  m.impl("quant_prefill.out", TORCH_BOX(&quant_prefill_out))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_QUANT_ATTENTION_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_QUANT_ATTENTION_IMPLS(m); }

}  // namespace kvk::torch_face
