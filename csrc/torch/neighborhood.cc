// torch.ops.kvk: neighborhood attention and its gradient.
#include "kvk/neighborhood.h"

#include <algorithm>
#include <vector>

#include "core/check.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;

#define KVK_NEIGHBORHOOD_OPTIONS                                                      \
  "int[] kernel_size, *, int[] stride=[1], int[] dilation=[1], int[] is_causal=[0], " \
  "float? softmax_scale=None"

// The axes as the call gives them: every list has one entry for all dimensions, or one for each.
struct Axes {
  const std::vector<int64_t>& kernel_size;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& dilation;
  const std::vector<int64_t>& is_causal;

  std::array<NeighborhoodAxis, 3> of(const char* op, const TorchTensor& q) const {
    const int64_t n = q.dim() - 3;
    const auto entry = [&](const auto& list, const char* name, int64_t i) {
      const auto size = static_cast<int64_t>(list.size());
      if (size != 1 && size != n) {
        fail(op, name, " must be one value or one for each of the ", n, " dimensions of q, got ", size, " of them");
      }
      return list[static_cast<size_t>(size == 1 ? 0 : i)];
    };
    std::array<NeighborhoodAxis, 3> axes;
    for (int64_t i = 0; i < std::min<int64_t>(n, 3); ++i) {
      axes[static_cast<size_t>(i)] = {entry(kernel_size, "kernel_size", i), entry(stride, "stride", i),
                                      entry(dilation, "dilation", i), entry(is_causal, "is_causal", i) != 0};
    }
    return axes;
  }
};

void neighborhood_out(TorchTensor q, TorchTensor k, TorchTensor v, std::vector<int64_t> kernel_size,
                      std::vector<int64_t> stride, std::vector<int64_t> dilation, std::vector<int64_t> is_causal,
                      std::optional<double> softmax_scale, TorchTensor out, TorchTensor lse) {
  const Axes axes = {kernel_size, stride, dilation, is_causal};
  neighborhood_attention(
      {view(q), view(k), view(v), axes.of("neighborhood_attention", q), softmax_scale, view(out), view(lse)},
      TorchContext(q));
}

// [B, X.., Hq] and [B, X.., Hq, Dv] for every rank of q; the checks of the shapes come after.
std::vector<int64_t> rows_of(const char* op, const TorchTensor& q) {
  if (q.dim() < 4 || q.dim() > 6) {
    fail(op, "q must have shape [B, X.., Hq, D] with 1, 2 or 3 dimensions X.., got ", shape_string(view(q)));
  }
  const auto sizes = q.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

std::tuple<TorchTensor, TorchTensor> neighborhood_new(TorchTensor q, TorchTensor k, TorchTensor v,
                                                      std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                      std::vector<int64_t> dilation, std::vector<int64_t> is_causal,
                                                      std::optional<double> softmax_scale) {
  const char* op = "neighborhood_attention";
  std::vector<int64_t> sizes = rows_of(op, q);
  if (v.dim() != q.dim()) fail(op, "v must have the ", q.dim(), " dimensions of q, got ", shape_string(view(v)));
  TorchTensor lse = torch::stable::new_empty(q, sizes, ScalarType::Float);
  sizes.push_back(v.size(v.dim() - 1));
  TorchTensor out = torch::stable::new_empty(q, sizes);
  neighborhood_out(q, k, v, std::move(kernel_size), std::move(stride), std::move(dilation), std::move(is_causal),
                   softmax_scale, out, lse);
  return {out, lse};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> neighborhood_grad(
    TorchTensor grad_out, TorchTensor grad_lse, TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor out,
    TorchTensor lse, std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> dilation,
    std::vector<int64_t> is_causal, std::optional<double> softmax_scale) {
  const Axes axes = {kernel_size, stride, dilation, is_causal};
  TorchTensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  neighborhood_attention_backward(
      {{view(q), view(k), view(v), axes.of("neighborhood_attention_backward", q), softmax_scale, view(out), view(lse)},
       view(grad_out),
       view(grad_lse),
       view(dq),
       view(dk),
       view(dv)},
      TorchContext(q));
  return {dq, dk, dv};
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("neighborhood_attention(Tensor q, Tensor k, Tensor v, " KVK_NEIGHBORHOOD_OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def("neighborhood_attention.out(Tensor q, Tensor k, Tensor v, " KVK_NEIGHBORHOOD_OPTIONS KVK_OUT_SCHEMA);
  m.def(
      "neighborhood_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, " KVK_NEIGHBORHOOD_OPTIONS ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

#define KVK_NEIGHBORHOOD_IMPLS(m)                                     \
  m.impl("neighborhood_attention", TORCH_BOX(&neighborhood_new));     \
  m.impl("neighborhood_attention.out", TORCH_BOX(&neighborhood_out)); \
  m.impl("neighborhood_attention_backward", TORCH_BOX(&neighborhood_grad))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_NEIGHBORHOOD_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_NEIGHBORHOOD_IMPLS(m); }

}  // namespace kvk::torch_face
