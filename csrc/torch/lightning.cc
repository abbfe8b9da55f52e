// torch.ops.kvk: lightning linear attention.
#include "kvk/lightning.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;

TorchTensor new_state(const char* op, const TorchTensor& q, const TorchTensor& v, const MaybeTensor& cu_seqlens) {
  if (cu_seqlens) require_rank(op, *cu_seqlens, "cu_seqlens", 1, "[N + 1]");
  const int64_t sequences = cu_seqlens ? std::max<int64_t>(0, cu_seqlens->size(0) - 1) : q.size(0);
  return new_tensor(q, {sequences, q.size(2), q.size(3), v.size(3)}, ScalarType::Float);
}

void attention_out(TorchTensor q, TorchTensor k, TorchTensor v, MaybeTensor log_decay, MaybeTensor initial_state,
                   MaybeTensor cu_seqlens, double scale, TorchTensor out, TorchTensor final_state) {
  lightning_attention({view(q), view(k), view(v), view(log_decay), scale, view(initial_state), view(cu_seqlens),
                       view(out), view(final_state)},
                      TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor> attention_new(TorchTensor q, TorchTensor k, TorchTensor v, MaybeTensor log_decay,
                                                   MaybeTensor initial_state, MaybeTensor cu_seqlens, double scale) {
  constexpr const char* kOp = "lightning_attention";
  require_rank(kOp, q, "q", 4, "[B, T, H, Dk]");
  require_rank(kOp, v, "v", 4, "[B, T, H, Dv]");
  TorchTensor out = new_tensor(q, {v.size(0), v.size(1), v.size(2), v.size(3)}, v.scalar_type());
  TorchTensor final_state = new_state(kOp, q, v, cu_seqlens);
  attention_out(q, k, v, log_decay, initial_state, cu_seqlens, scale, out, final_state);
  return {out, final_state};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> attention_grad(
    TorchTensor grad_out, MaybeTensor grad_final_state, TorchTensor q, TorchTensor k, TorchTensor v,
    MaybeTensor log_decay, MaybeTensor initial_state, MaybeTensor cu_seqlens, double scale, bool decay_grad) {
  constexpr const char* kOp = "lightning_attention_backward";
  require_rank(kOp, q, "q", 4, "[B, T, H, Dk]");
  require_rank(kOp, k, "k", 4, "[B, T, H, Dk]");
  require_rank(kOp, v, "v", 4, "[B, T, H, Dv]");
  TorchTensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  TorchTensor grad_decay = new_tensor(q, {0}, ScalarType::Float), grad_state = new_tensor(q, {0}, ScalarType::Float);
  MaybeTensor wanted_decay, wanted_state;
  if (decay_grad && log_decay) {
    if (log_decay->dim() != 1) require_rank(kOp, *log_decay, "log_decay", 3, "[H] or [B, T, H]");
    grad_decay = log_decay->dim() == 1
                     ? new_tensor(q, {log_decay->size(0)}, ScalarType::Float)
                     : new_tensor(q, {log_decay->size(0), log_decay->size(1), log_decay->size(2)}, ScalarType::Float);
    wanted_decay = grad_decay;
  }
  if (initial_state) wanted_state = grad_state = new_state(kOp, q, v, cu_seqlens);
  lightning_attention_backward(
      {view(grad_out), view(grad_final_state), view(q), view(k), view(v), view(log_decay), scale, view(initial_state),
       view(cu_seqlens), view(grad_q), view(grad_k), view(grad_v), view(wanted_decay), view(wanted_state)},
      TorchContext(q));
  return {grad_q, grad_k, grad_v, grad_decay, grad_state};
}

void decode_out(TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor state, TorchTensor slots,
                MaybeTensor log_decay, double scale, TorchTensor out) {
  lightning_decode({view(q), view(k), view(v), view(state), view(slots), view(log_decay), scale, view(out)},
                   TorchContext(q));
}

TorchTensor decode_new(TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor state, TorchTensor slots,
                       MaybeTensor log_decay, double scale) {
  require_rank("lightning_decode", v, "v", 3, "[B, H, Dv]");
  TorchTensor out = new_tensor(q, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  decode_out(q, k, v, state, slots, log_decay, scale, out);
  return out;
}

#define KVK_LIGHTNING_SCHEMA                                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, " \
  "float scale=1.0"
#define KVK_LIGHTNING_DECODE_SCHEMA \
  "Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor slots, Tensor? log_decay, *, float scale=1.0"

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("lightning_attention(" KVK_LIGHTNING_SCHEMA ") -> (Tensor out, Tensor final_state)");
  m.def("lightning_attention.out(" KVK_LIGHTNING_SCHEMA ", Tensor(a!) out, Tensor(b!) final_state) -> ()");
  m.def("lightning_attention_backward(Tensor grad_out, Tensor? grad_final_state, " KVK_LIGHTNING_SCHEMA
        ", bool decay_grad=True) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, "
        "Tensor grad_initial_state)");
  m.def("lightning_decode(" KVK_LIGHTNING_DECODE_SCHEMA ") -> Tensor");
  m.def("lightning_decode.out(" KVK_LIGHTNING_DECODE_SCHEMA ", Tensor(b!) out) -> ()");
}

#define KVK_LIGHTNING_IMPLS(m)                                        \
  m.impl("lightning_attention", TORCH_BOX(&attention_new));           \
  m.impl("lightning_attention.out", TORCH_BOX(&attention_out));       \
  m.impl("lightning_attention_backward", TORCH_BOX(&attention_grad)); \
  m.impl("lightning_decode", TORCH_BOX(&decode_new));                 \
  m.impl("lightning_decode.out", TORCH_BOX(&decode_out))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_LIGHTNING_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_LIGHTNING_IMPLS(m); }

}  // namespace kvk::torch_face
