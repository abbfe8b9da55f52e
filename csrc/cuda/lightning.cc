// Launch code of lightning attention and its decode step.
#include "kvk/lightning.h"

#include "cuda/launch.h"
#include "kvk/device/lightning_params.h"

namespace kvk::cuda {
namespace {

using device::DecayView;
using device::RowsView;
using device::StateView;

Kernel decode_kernel(DType dtype) {
  return {"kvk/device/lightning_decode.cuh", "kvk::device::lightning_decode_kernel<" + kernel_type(dtype) + ">"};
}

RowsView rows_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1]}; }

StateView state_view(const Tensor& t) { return {t.ptr<float>(), t.stride[0], t.stride[1], t.stride[2]}; }

// [H] or [B, H].
DecayView decay_view(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<const float>(), t->ndim == 1 ? 0 : t->stride[0], t->stride[t->ndim - 1]};
}

}  // namespace

void launch_lightning_decode(const LightningDecodeArgs& args, Launcher& launcher) {
  device::LightningDecodeParams params = {};
  params.q = rows_view(args.q);
  params.k = rows_view(args.k);
  params.v = rows_view(args.v);
  params.out = rows_view(args.out);
  params.state = state_view(args.state);
  params.num_slots = args.state.shape[0];
  params.slots = args.slots.ptr<const int32_t>();
  params.slots_stride = args.slots.stride[0];
  params.log_decay = decay_view(args.log_decay);
  params.num_heads = static_cast<int32_t>(args.q.shape[1]);
  params.dk = static_cast<int32_t>(args.q.shape[2]);
  params.dv = static_cast<int32_t>(args.v.shape[2]);
  params.scale = static_cast<float>(args.scale);
  const int64_t tiles = device::ceil_div<int64_t>(params.dv, device::kLightningDecodeColumns);
  const int64_t blocks = args.q.shape[0] * args.q.shape[1] * tiles;
  launch(launcher, decode_kernel(args.q.dtype), {static_cast<uint32_t>(blocks), 1, 1}, 128, 0, params);
}

std::vector<Kernel> default_lightning_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) kernels.push_back(decode_kernel(dtype));
  return kernels;
}

}  // namespace kvk::cuda
