// Launch code of lightning attention and its decode step.
#include "kvk/lightning.h"

#include "cuda/launch.h"
#include "kvk/device/lightning_params.h"

namespace kvk::cuda {
namespace {

using device::DecayView;
using device::RowsView;
using device::SequenceView;
using device::StateView;

Kernel forward_kernel(DType dtype, int64_t dk, bool small) {
  return {"kvk/device/lightning.cuh",
          "kvk::device::lightning_forward_kernel<kvk::device::LightningConfig<" + kernel_type(dtype) + ", " +
              std::to_string(device::round_up<int64_t>(dk, 16)) + (small ? ", true>>" : ">>")};
}

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

SequenceView sequence_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

// [H] or [B, T, H].
SequenceView decay_sequences(const std::optional<Tensor>& t) {
  if (!t) return {};
  return t->ndim == 1 ? SequenceView{t->data, 0, 0, t->stride[0]} : sequence_view(*t);
}

}  // namespace

void launch_lightning_attention(const LightningArgs& args, Launcher& launcher) {
  const Tensor& q = args.q;
  device::LightningParams params = {};
  params.q = sequence_view(q);
  params.k = sequence_view(args.k);
  params.v = sequence_view(args.v);
  params.out = sequence_view(args.out);
  params.log_decay = decay_sequences(args.log_decay);
  if (args.initial_state) params.initial = state_view(*args.initial_state);
  params.final = state_view(args.final_state);
  params.sequences = {nullptr, 0, args.final_state.shape[0], q.shape[1]};
  if (args.cu_seqlens) {
    params.sequences.starts = args.cu_seqlens->ptr<const int32_t>();
    params.sequences.stride = args.cu_seqlens->stride[0];
  }
  params.num_heads = static_cast<int32_t>(q.shape[2]);
  params.dk = static_cast<int32_t>(q.shape[3]);
  params.dv = static_cast<int32_t>(args.v.shape[3]);
  params.scale = static_cast<float>(args.scale);
  const int parts = device::lightning_parts(q.dtype == DType::bf16);
  const auto shape = [&](bool small) { return device::LightningShape(params.dk, parts, small); };
  const bool small = shape(false).shared_bytes() > static_cast<size_t>(launcher.properties().max_shared_per_block);
  // The tokens behind the last packed sequence have blocks of their own.
  const int64_t rows = params.sequences.num_sequences + (args.cu_seqlens ? 1 : 0);
  const int64_t tiles = device::ceil_div<int64_t>(params.dv, device::LightningShape::kColumns);
  launch(launcher, forward_kernel(q.dtype, params.dk, small),
         {static_cast<uint32_t>(rows * params.num_heads * tiles), 1, 1}, device::LightningShape::kThreads,
         shape(small).shared_bytes(), params);
}

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
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int64_t dk : {64, 128, 256}) kernels.push_back(forward_kernel(dtype, dk, false));
    kernels.push_back(forward_kernel(dtype, 128, true));
    kernels.push_back(decode_kernel(dtype));
  }
  return kernels;
}

}  // namespace kvk::cuda
