// torch.ops.kvk: paged attention. Schemas follow the C++ structs of kvk/paged.h; a plain op makes its outputs and calls
// the .out form's function.
#include "kvk/paged.h"

#include <tuple>

#include "core/check.h"
#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {

void require_rank(const char* op, const TorchTensor& t, const char* name, int64_t rank, const char* shape) {
  if (t.dim() != rank) fail(op, name, " must have shape ", shape, ", got ", shape_string(view(t)));
}

ScoreOptions score_options(std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap,
                           const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& key_bias) {
  return {softmax_scale, window_left, logits_soft_cap, view(alibi_slopes), view(sinks), view(key_bias)};
}

namespace {

using torch::headeronly::ScalarType;

void paged_decode_out(TorchTensor q, TorchTensor k_pages, TorchTensor v_pages, TorchTensor page_indices,
                      TorchTensor kv_lens, MaybeTensor page_indptr, std::optional<double> softmax_scale,
                      int64_t window_left, double logits_soft_cap, MaybeTensor alibi_slopes, MaybeTensor sinks,
                      MaybeTensor key_bias, TorchTensor out, TorchTensor lse) {
  paged_decode({view(q),
                view(k_pages),
                view(v_pages),
                {view(page_indices), view(page_indptr), view(kv_lens)},
                score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                view(out),
                view(lse)},
               TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> paged_decode_new(TorchTensor q, TorchTensor k_pages, TorchTensor v_pages,
                                                      TorchTensor page_indices, TorchTensor kv_lens,
                                                      MaybeTensor page_indptr, std::optional<double> softmax_scale,
                                                      int64_t window_left, double logits_soft_cap,
                                                      MaybeTensor alibi_slopes, MaybeTensor sinks,
                                                      MaybeTensor key_bias) {
  require_rank("paged_decode", q, "q", 3, "[B, Hq, D]");
  require_rank("paged_decode", v_pages, "v_pages", 4, "[N, P, Hkv, Dv]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), v_pages.size(3)}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  paged_decode_out(q, k_pages, v_pages, page_indices, kv_lens, page_indptr, softmax_scale, window_left, logits_soft_cap,
                   alibi_slopes, sinks, key_bias, out, lse);
  return {out, lse};
}

void paged_prefill_out(TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pages, TorchTensor v_pages,
                       TorchTensor page_indices, TorchTensor kv_lens, MaybeTensor page_indptr, bool causal,
                       std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap,
                       MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor key_bias, MaybeTensor mask_bits,
                       int64_t mask_width, TorchTensor out, TorchTensor lse) {
  paged_prefill({view(q),
                 view(qo_indptr),
                 view(k_pages),
                 view(v_pages),
                 {view(page_indices), view(page_indptr), view(kv_lens)},
                 score_options(softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias),
                 causal,
                 view(mask_bits),
                 mask_width,
                 view(out),
                 view(lse)},
                TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> paged_prefill_new(TorchTensor q, TorchTensor qo_indptr, TorchTensor k_pages,
                                                       TorchTensor v_pages, TorchTensor page_indices,
                                                       TorchTensor kv_lens, MaybeTensor page_indptr, bool causal,
                                                       std::optional<double> softmax_scale, int64_t window_left,
                                                       double logits_soft_cap, MaybeTensor alibi_slopes,
                                                       MaybeTensor sinks, MaybeTensor key_bias, MaybeTensor mask_bits,
                                                       int64_t mask_width) {
  require_rank("paged_prefill", q, "q", 3, "[T, Hq, D]");
  require_rank("paged_prefill", v_pages, "v_pages", 4, "[N, P, Hkv, Dv]");
  TorchTensor out = new_tensor(q, {q.size(0), q.size(1), v_pages.size(3)}, q.scalar_type());
  TorchTensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  paged_prefill_out(q, qo_indptr, k_pages, v_pages, page_indices, kv_lens, page_indptr, causal, softmax_scale,
                    window_left, logits_soft_cap, alibi_slopes, sinks, key_bias, mask_bits, mask_width, out, lse);
  return {out, lse};
}

void append(TorchTensor k, TorchTensor v, TorchTensor k_pages, TorchTensor v_pages, TorchTensor slot_mapping) {
  append_kv({view(k), view(v), view(k_pages), view(v_pages), view(slot_mapping)}, TorchContext(k));
}

void merge_states_out(TorchTensor parts, TorchTensor parts_lse, TorchTensor merged_out, TorchTensor merged_lse) {
  merge_states({view(parts), view(parts_lse), view(merged_out), view(merged_lse)}, TorchContext(parts));
}

std::tuple<TorchTensor, TorchTensor> merge_states_new(TorchTensor parts, TorchTensor parts_lse) {
  require_rank("merge_states", parts, "out", 4, "[n, T, H, D]");
  TorchTensor out = new_tensor(parts, {parts.size(1), parts.size(2), parts.size(3)}, parts.scalar_type());
  TorchTensor lse = new_tensor(parts, {parts.size(1), parts.size(2)}, ScalarType::Float);
  merge_states_out(parts, parts_lse, out, lse);
  return {out, lse};
}

std::tuple<TorchTensor, TorchTensor> merge_states_grad(TorchTensor grad_out, TorchTensor grad_lse, TorchTensor parts,
                                                       TorchTensor parts_lse) {
  require_rank("merge_states_backward", parts, "out", 4, "[n, T, H, D]");
  TorchTensor grad_parts =
      new_tensor(parts, {parts.size(0), parts.size(1), parts.size(2), parts.size(3)}, parts.scalar_type());
  TorchTensor grad_parts_lse = new_tensor(parts, {parts.size(0), parts.size(1), parts.size(2)}, ScalarType::Float);
  merge_states_backward(
      {view(grad_out), view(grad_lse), view(parts), view(parts_lse), view(grad_parts), view(grad_parts_lse)},
      TorchContext(parts));
  return {grad_parts, grad_parts_lse};
}

#define KVK_DECODE_SCHEMA                                                              \
  "Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_indices, Tensor kv_lens, *, " \
  "Tensor? page_indptr=None, " KVK_SCORE_SCHEMA
#define KVK_PREFILL_SCHEMA                                                                               \
  "Tensor q, Tensor qo_indptr, Tensor k_pages, Tensor v_pages, Tensor page_indices, Tensor kv_lens, *, " \
  "Tensor? page_indptr=None, bool causal=True, " KVK_SCORE_SCHEMA ", Tensor? mask_bits=None, int mask_width=-1"

}  // namespace

KVK_LIBRARY(KVK_NAMESPACE, m) {
  m.def("paged_decode(" KVK_DECODE_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("paged_decode.out(" KVK_DECODE_SCHEMA KVK_OUT_SCHEMA);
  m.def("paged_prefill(" KVK_PREFILL_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("paged_prefill.out(" KVK_PREFILL_SCHEMA KVK_OUT_SCHEMA);
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slot_mapping) -> ()");
  m.def("merge_states(Tensor out, Tensor lse) -> (Tensor merged_out, Tensor merged_lse)");
  m.def("merge_states.out(Tensor out, Tensor lse, *, Tensor(a!) merged_out, Tensor(b!) merged_lse) -> ()");
  m.def(
      "merge_states_backward(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse) -> (Tensor grad, Tensor grad_of_lse)");
}

// The same functions serve both devices: the C++ face looks at the tensors.
#define KVK_PAGED_IMPLS(m)                                    \
  m.impl("paged_decode", TORCH_BOX(&paged_decode_new));       \
  m.impl("paged_decode.out", TORCH_BOX(&paged_decode_out));   \
  m.impl("paged_prefill", TORCH_BOX(&paged_prefill_new));     \
  m.impl("paged_prefill.out", TORCH_BOX(&paged_prefill_out)); \
  m.impl("append_kv", TORCH_BOX(&append));                    \
  m.impl("merge_states", TORCH_BOX(&merge_states_new));       \
  m.impl("merge_states.out", TORCH_BOX(&merge_states_out));   \
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_grad))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_PAGED_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_PAGED_IMPLS(m); }

}  // namespace kvk::torch_face
