// torch.ops.kvk: block-sparse attention and its gradient.
#include "kvk/block_sparse.h"

#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;

#define KVK_BLOCK_SPARSE_INPUTS "Tensor q, Tensor k, Tensor v, "
// Differentiable ops have no keyword-only tensors: an autograd registration in Python does not take them.
#define KVK_BLOCK_SPARSE_OPTIONS                                                          \
  "Tensor row_ptr, Tensor col_idx, int block_q, int block_k, Tensor? cu_seqlens_q=None, " \
  "Tensor? cu_seqlens_k=None, Tensor? entry_bias=None, *, bool causal=False, float? softmax_scale=None"

BlockSparseAttentionArgs arguments(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
                                   const TorchTensor& row_ptr, const TorchTensor& col_idx, int64_t block_q,
                                   int64_t block_k, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
                                   const MaybeTensor& entry_bias, bool causal, std::optional<double> softmax_scale,
                                   const TorchTensor& out, const TorchTensor& lse) {
  return {view(q),
          view(k),
          view(v),
          {view(row_ptr), view(col_idx), block_q, block_k, view(entry_bias)},
          view(cu_seqlens_q),
          view(cu_seqlens_k),
          causal,
          softmax_scale,
          view(out),
          view(lse)};
}

void block_sparse_out(TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor row_ptr, TorchTensor col_idx,
                      int64_t block_q, int64_t block_k, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                      MaybeTensor entry_bias, bool causal, std::optional<double> softmax_scale, TorchTensor out,
                      TorchTensor lse) {
  block_sparse_attention(arguments(q, k, v, row_ptr, col_idx, block_q, block_k, cu_seqlens_q, cu_seqlens_k, entry_bias,
                                   causal, softmax_scale, out, lse),
                         TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> block_sparse_new(TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor row_ptr,
                                                      TorchTensor col_idx, int64_t block_q, int64_t block_k,
                                                      MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                                      MaybeTensor entry_bias, bool causal,
                                                      std::optional<double> softmax_scale) {
  require_rank("block_sparse_attention", q, "q", 3, "[T, Hq, D]");
  require_rank("block_sparse_attention", v, "v", 3, "[S, Hkv, Dv]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  block_sparse_out(q, k, v, row_ptr, col_idx, block_q, block_k, cu_seqlens_q, cu_seqlens_k, entry_bias, causal,
                   softmax_scale, out, lse);
  return {out, lse};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> block_sparse_grad(
    TorchTensor grad_out, TorchTensor grad_lse, TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor out,
    TorchTensor lse, TorchTensor row_ptr, TorchTensor col_idx, int64_t block_q, int64_t block_k,
    MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor entry_bias, bool causal,
    std::optional<double> softmax_scale) {
  TorchTensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  block_sparse_attention_backward({arguments(q, k, v, row_ptr, col_idx, block_q, block_k, cu_seqlens_q, cu_seqlens_k,
                                             entry_bias, causal, softmax_scale, out, lse),
                                   view(grad_out), view(grad_lse), view(dq), view(dk), view(dv)},
                                  TorchContext(q));
  return {dq, dk, dv};
}

#define KVK_VERTICAL_SLASH_SCHEMA                                                               \
  "Tensor q, Tensor k, Tensor v, Tensor vertical, Tensor slash, *, Tensor? cu_seqlens_q=None, " \
  "Tensor? cu_seqlens_k=None, float? softmax_scale=None"

void vertical_slash_out(TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor vertical, TorchTensor slash,
                        MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, std::optional<double> softmax_scale,
                        TorchTensor out, TorchTensor lse) {
  vertical_slash_attention({view(q), view(k), view(v), view(vertical), view(slash), view(cu_seqlens_q),
                            view(cu_seqlens_k), softmax_scale, view(out), view(lse)},
                           TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> vertical_slash_new(TorchTensor q, TorchTensor k, TorchTensor v,
                                                        TorchTensor vertical, TorchTensor slash,
                                                        MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                                        std::optional<double> softmax_scale) {
  require_rank("vertical_slash_attention", q, "q", 3, "[T, Hq, D]");
  require_rank("vertical_slash_attention", v, "v", 3, "[S, Hkv, Dv]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  vertical_slash_out(q, k, v, vertical, slash, cu_seqlens_q, cu_seqlens_k, softmax_scale, out, lse);
  return {out, lse};
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("block_sparse_attention(" KVK_BLOCK_SPARSE_INPUTS KVK_BLOCK_SPARSE_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("block_sparse_attention.out(" KVK_BLOCK_SPARSE_INPUTS KVK_BLOCK_SPARSE_OPTIONS KVK_OUT_SCHEMA);
  m.def("vertical_slash_attention(" KVK_VERTICAL_SLASH_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("vertical_slash_attention.out(" KVK_VERTICAL_SLASH_SCHEMA KVK_OUT_SCHEMA);
  m.def("block_sparse_attention_backward(Tensor grad_out, Tensor grad_lse, " KVK_BLOCK_SPARSE_INPUTS
        "Tensor out, Tensor lse, " KVK_BLOCK_SPARSE_OPTIONS ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

#define KVK_BLOCK_SPARSE_IMPLS(m)                                         \
  m.impl("vertical_slash_attention", TORCH_BOX(&vertical_slash_new));     \
  m.impl("vertical_slash_attention.out", TORCH_BOX(&vertical_slash_out)); \
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_new));         \
  m.impl("block_sparse_attention.out", TORCH_BOX(&block_sparse_out));     \
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_grad))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_BLOCK_SPARSE_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_BLOCK_SPARSE_IMPLS(m); }

}  // namespace kvk::torch_face
