#include "torch/adapter.h"

#include <vector>

#include "core/check.h"
#include "core/explain.h"

namespace kvk::torch_face {

DType dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Short: return DType::i16;
    case ScalarType::Char: return DType::i8;
    case ScalarType::Byte: return DType::u8;
    case ScalarType::Bool: return DType::boolean;
    default: return DType::other;
  }
}

namespace {

class TorchThreads final : public Threads {
 public:
  int count() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int workers, void (*task)(void*, int), void* context) override {
    torch::stable::parallel_for(0, workers, 1, [=](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) task(context, static_cast<int>(worker));
    });
  }
};

}  // namespace

Tensor view(const TorchTensor& t) {
  Tensor v;
  v.ndim = static_cast<int32_t>(t.dim());
  if (v.ndim > kMaxDims) fail("tensor", "has ", v.ndim, " dimensions, more than the ", kMaxDims, " that kvk takes");
  v.dtype = dtype_of(t.scalar_type());
  v.device = device_of(t);
  const explain::Notes* notes = explain::notes();
  if (notes != nullptr && notes->card) v.device = {DeviceType::cuda, 0};  // thought to lie there
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int32_t i = 0; i < v.ndim; ++i) {
    v.shape[i] = sizes[static_cast<size_t>(i)];
    v.stride[i] = strides[static_cast<size_t>(i)];
  }
  if (v.device.type != DeviceType::other) v.data = const_cast<void*>(t.const_data_ptr());
  return v;
}

std::optional<Tensor> view(const std::optional<TorchTensor>& t) {
  if (!t) return std::nullopt;
  return view(*t);
}

TorchTensor new_tensor(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       torch::headeronly::ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, sizes, dtype);
}

TorchTensor new_like(const TorchTensor& t) { return torch::stable::new_empty(t, t.sizes()); }

TorchContext::TorchContext(const TorchTensor& like) : like_(like) {
  static TorchThreads threads;
  context_.threads = &threads;
  context_.allocator = this;
  context_.cuda_stream = current_stream(device_of(like));
}

void* TorchContext::allocate(Device, int64_t bytes) {
  memory_.push_back(new_tensor(like_, {bytes}, torch::headeronly::ScalarType::Byte));
  return memory_.back().mutable_data_ptr();
}

}  // namespace kvk::torch_face
