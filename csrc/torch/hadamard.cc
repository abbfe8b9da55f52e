// torch.ops.kvk: the Hadamard transform.
#include "kvk/hadamard.h"

#include <torch/csrc/stable/ops.h>

#include "torch/adapter.h"

namespace kvk::torch_face {
namespace {

void hadamard_out(TorchTensor x, std::optional<double> scale, bool transpose, TorchTensor out) {
  hadamard({view(x), scale, transpose, view(out)}, TorchContext(x));
}

TorchTensor hadamard_new(TorchTensor x, std::optional<double> scale, bool transpose) {
  TorchTensor out = torch::stable::new_empty(x, x.sizes());
  hadamard_out(x, scale, transpose, out);
  return out;
}

void hadamard_in_place(TorchTensor x, std::optional<double> scale, bool transpose) {
  hadamard_out(x, scale, transpose, x);
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("hadamard(Tensor x, *, float? scale=None, bool transpose=False) -> Tensor");
  m.def("hadamard.out(Tensor x, *, float? scale=None, bool transpose=False, Tensor(a!) out) -> ()");
  m.def("hadamard_(Tensor(a!) x, *, float? scale=None, bool transpose=False) -> ()");
}

#define KVK_HADAMARD_IMPLS(m)                       \
  m.impl("hadamard", TORCH_BOX(&hadamard_new));     \
  m.impl("hadamard.out", TORCH_BOX(&hadamard_out)); \
  m.impl("hadamard_", TORCH_BOX(&hadamard_in_place))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_HADAMARD_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_HADAMARD_IMPLS(m); }

}  // namespace kvk::torch_face
