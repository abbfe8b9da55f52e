// torch.ops.kvk: normalised linear attention and the Taylor feature map.
#include "kvk/linear.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;

int64_t sequences_of(const char* op, const TorchTensor& q, const MaybeTensor& cu_seqlens) {
  if (!cu_seqlens) return q.size(0);
  require_rank(op, *cu_seqlens, "cu_seqlens", 1, "[N + 1]");
  return std::max<int64_t>(0, cu_seqlens->size(0) - 1);
}

LinearAttentionArgs inputs(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const MaybeTensor& q_den,
                           const MaybeTensor& k_den, const MaybeTensor& initial_state, const MaybeTensor& initial_z,
                           const MaybeTensor& cu_seqlens, bool causal, int64_t block_size, bool normalize, double scale,
                           double eps) {
  return {view(q),
          view(k),
          view(v),
          view(q_den),
          view(k_den),
          view(initial_state),
          view(initial_z),
          view(cu_seqlens),
          causal,
          block_size,
          normalize,
          scale,
          eps,
          {},
          {},
          {},
          {}};
}

void attention_out(TorchTensor q, TorchTensor k, TorchTensor v, MaybeTensor q_den, MaybeTensor k_den,
                   MaybeTensor initial_state, MaybeTensor initial_z, MaybeTensor cu_seqlens, bool causal,
                   int64_t block_size, bool normalize, double scale, double eps, TorchTensor out, TorchTensor den,
                   TorchTensor final_state, TorchTensor final_z) {
  LinearAttentionArgs args =
      inputs(q, k, v, q_den, k_den, initial_state, initial_z, cu_seqlens, causal, block_size, normalize, scale, eps);
  args.out = view(out);
  args.den = view(den);
  args.final_state = view(final_state);
  args.final_z = view(final_z);
  linear_attention(args, TorchContext(q));
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> attention_new(
    TorchTensor q, TorchTensor k, TorchTensor v, MaybeTensor q_den, MaybeTensor k_den, MaybeTensor initial_state,
    MaybeTensor initial_z, MaybeTensor cu_seqlens, bool causal, int64_t block_size, bool normalize, double scale,
    double eps) {
  constexpr const char* kOp = "linear_attention";
  require_rank(kOp, q, "q", 4, "[B, T, H, Dk]");
  require_rank(kOp, v, "v", 4, "[B, T, H, Dv]");
  const int64_t count = sequences_of(kOp, q, cu_seqlens);
  TorchTensor out = new_tensor(q, {v.size(0), v.size(1), v.size(2), v.size(3)}, v.scalar_type());
  TorchTensor den = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  TorchTensor final_state = new_tensor(q, {count, q.size(2), q.size(3), v.size(3)}, ScalarType::Float);
  TorchTensor final_z = new_tensor(q, {count, q.size(2), q.size(3)}, ScalarType::Float);
  attention_out(q, k, v, q_den, k_den, initial_state, initial_z, cu_seqlens, causal, block_size, normalize, scale, eps,
                out, den, final_state, final_z);
  return {out, den, final_state, final_z};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> attention_grad(
    TorchTensor grad_out, MaybeTensor grad_den, MaybeTensor grad_final_state, MaybeTensor grad_final_z, TorchTensor q,
    TorchTensor k, TorchTensor v, MaybeTensor q_den, MaybeTensor k_den, MaybeTensor initial_state,
    MaybeTensor initial_z, MaybeTensor cu_seqlens, bool causal, int64_t block_size, bool normalize, double scale,
    double eps) {
  constexpr const char* kOp = "linear_attention_backward";
  require_rank(kOp, q, "q", 4, "[B, T, H, Dk]");
  require_rank(kOp, k, "k", 4, "[B, T, H, Dk]");
  require_rank(kOp, v, "v", 4, "[B, T, H, Dv]");
  const int64_t count = sequences_of(kOp, q, cu_seqlens);
  // What is not wanted is empty.
  TorchTensor of_q = new_like(q), of_k = new_like(k), of_v = new_like(v);
  TorchTensor of_q_den = new_tensor(q, {0}, q.scalar_type()), of_k_den = new_tensor(q, {0}, q.scalar_type());
  TorchTensor of_state = new_tensor(q, {0}, ScalarType::Float), of_z = new_tensor(q, {0}, ScalarType::Float);
  MaybeTensor wanted_q_den, wanted_k_den, wanted_state, wanted_z;
  if (q_den) wanted_q_den = of_q_den = new_like(*q_den);
  if (k_den) wanted_k_den = of_k_den = new_like(*k_den);
  if (initial_state) {
    wanted_state = of_state = new_tensor(q, {count, q.size(2), q.size(3), v.size(3)}, ScalarType::Float);
  }
  if (initial_z) wanted_z = of_z = new_tensor(q, {count, q.size(2), q.size(3)}, ScalarType::Float);
  linear_attention_backward(
      {inputs(q, k, v, q_den, k_den, initial_state, initial_z, cu_seqlens, causal, block_size, normalize, scale, eps),
       view(grad_out), view(grad_den), view(grad_final_state), view(grad_final_z), view(of_q), view(of_k), view(of_v),
       view(wanted_q_den), view(wanted_k_den), view(wanted_state), view(wanted_z)},
      TorchContext(q));
  return {of_q, of_k, of_v, of_q_den, of_k_den, of_state, of_z};
}

void taylor_out(TorchTensor x, TorchTensor out) { taylor_feature_map({view(x), view(out)}, TorchContext(x)); }

TorchTensor taylor_new(TorchTensor x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty()) shape.back() = taylor_features(std::min(shape.back(), kMaxTaylorDim));
  TorchTensor out = torch::stable::new_empty(x, shape);
  taylor_out(x, out);
  return out;
}

TorchTensor taylor_grad(TorchTensor grad, TorchTensor x) {
  TorchTensor grad_x = new_like(x);
  taylor_feature_map_backward({view(grad), view(x), view(grad_x)}, TorchContext(x));
  return grad_x;
}

#define KVK_LINEAR_SCHEMA                                                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor? q_den=None, Tensor? k_den=None, Tensor? initial_state=None, "            \
  "Tensor? initial_z=None, Tensor? cu_seqlens=None, *, bool causal=True, int block_size=1, bool normalize=True, " \
  "float scale=1.0, float eps=1e-06"

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("linear_attention(" KVK_LINEAR_SCHEMA ") -> (Tensor out, Tensor den, Tensor final_state, Tensor final_z)");
  m.def("linear_attention.out(" KVK_LINEAR_SCHEMA
        ", Tensor(a!) out, Tensor(b!) den, Tensor(c!) final_state, Tensor(d!) final_z) -> ()");
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor? grad_den, Tensor? grad_final_state, "
      "Tensor? grad_final_z, " KVK_LINEAR_SCHEMA
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_den, Tensor grad_k_den, "
      "Tensor grad_initial_state, Tensor grad_initial_z)");
  m.def("taylor_feature_map(Tensor x) -> Tensor");
  m.def("taylor_feature_map.out(Tensor x, *, Tensor(a!) out) -> ()");
  m.def("taylor_feature_map_backward(Tensor grad, Tensor x) -> Tensor");
}

#define KVK_LINEAR_IMPLS(m)                                        \
  m.impl("linear_attention", TORCH_BOX(&attention_new));           \
  m.impl("linear_attention.out", TORCH_BOX(&attention_out));       \
  m.impl("linear_attention_backward", TORCH_BOX(&attention_grad)); \
  m.impl("taylor_feature_map", TORCH_BOX(&taylor_new));            \
  m.impl("taylor_feature_map.out", TORCH_BOX(&taylor_out));        \
  m.impl("taylor_feature_map_backward", TORCH_BOX(&taylor_grad))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_LINEAR_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_LINEAR_IMPLS(m); }

}  // namespace kvk::torch_face
