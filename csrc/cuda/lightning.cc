// Launch code of lightning attention and its decode step.
#include "kvk/lightning.h"

#include <algorithm>

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

StateView state_view(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<float>(), t->stride[0], t->stride[1], t->stride[2], 1};
}
StateView transposed(const StateView& view) {
  return {view.data, view.slot_stride, view.head_stride, view.column_stride, view.row_stride};
}

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

// What the forward kernel makes of tensors of one call, each in any role.
class Roles {
 public:
  Roles(const Tensor& q, const std::optional<Tensor>& log_decay, const std::optional<Tensor>& cu_seqlens, double scale,
        Launcher& launcher)
      : dtype_(q.dtype), launcher_(launcher), scale_(static_cast<float>(scale)) {
    common_.num_heads = static_cast<int32_t>(q.shape[2]);
    common_.log_decay = decay_sequences(log_decay);
    common_.sequences = {nullptr, 0, q.shape[0], q.shape[1], false};
    if (!cu_seqlens) return;
    common_.sequences.starts = cu_seqlens->ptr<const int32_t>();
    common_.sequences.stride = cu_seqlens->stride[0];
    common_.sequences.num_sequences = cu_seqlens->shape[0] - 1;
  }

  // out from the tokens before, S in fp32 [N, H, columns of q, columns of v].
  void run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const StateView& initial,
           const StateView& final) const {
    launch_roles(common_, scale_, 1.0f, q, k, v, out, initial, final);
  }
  // From the tokens after, the first factor of S with the scale.
  void run_reversed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const StateView& initial,
                    const StateView& final) const {
    device::LightningParams params = common_;
    params.sequences.reversed = true;
    params.log_decay = reversed(params.log_decay, sizeof(float));
    launch_roles(params, 1.0f, scale_, q, k, v, out, initial, final);
  }

 private:
  // Token 0 becomes the last one.
  SequenceView reversed(const SequenceView& view, size_t element) const {
    const int64_t last = std::max<int64_t>(common_.sequences.num_tokens - 1, 0);
    char* data = static_cast<char*>(view.data);
    if (data != nullptr) data += last * view.token_stride * static_cast<int64_t>(element);
    return {data, view.batch_stride, -view.token_stride, view.head_stride};
  }

  void launch_roles(device::LightningParams params, float past_scale, float key_scale, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Tensor& out, const StateView& initial, const StateView& final) const {
    const auto view = [&](const Tensor& t) {
      return params.sequences.reversed ? reversed(sequence_view(t), 2) : sequence_view(t);
    };
    params.q = view(q);
    params.k = view(k);
    params.v = view(v);
    params.out = view(out);
    params.initial = initial;
    params.final = final;
    params.dk = static_cast<int32_t>(q.shape[3]);
    params.dv = static_cast<int32_t>(v.shape[3]);
    params.scale = scale_;
    params.past_scale = past_scale;
    params.key_scale = key_scale;
    const int parts = device::lightning_parts(dtype_ == DType::bf16);
    const auto shape = [&](bool small) { return device::LightningShape(params.dk, parts, small); };
    const bool small = shape(false).shared_bytes() > static_cast<size_t>(launcher_.properties().max_shared_per_block);
    // The tokens behind the last packed sequence have blocks of their own.
    const int64_t rows = params.sequences.num_sequences + (params.sequences.starts != nullptr ? 1 : 0);
    const int64_t tiles = device::ceil_div<int64_t>(params.dv, device::LightningShape::kColumns);
    launch(launcher_, forward_kernel(dtype_, params.dk, small),
           {static_cast<uint32_t>(rows * params.num_heads * tiles), 1, 1}, device::LightningShape::kThreads,
           shape(small).shared_bytes(), params);
  }

  DType dtype_;
  Launcher& launcher_;
  float scale_;
  device::LightningParams common_ = {};
};

}  // namespace

void launch_lightning_attention(const LightningArgs& args, Launcher& launcher) {
  const Roles roles(args.q, args.log_decay, args.cu_seqlens, args.scale, launcher);
  roles.run(args.q, args.k, args.v, args.out, state_view(args.initial_state), state_view(args.final_state));
}

// With S the state before a token and R the gradient of the state after it:
//   dQ = lightning attention of (dO, V, K) with S^T
//   dV = that of (K, Q, dO) with R, dK of (V, dO, Q) with R^T, from the last token to the first
// Three passes, each of which makes its states anew: a fifth more FLOPs than two would take, and nothing is kept.
void launch_lightning_attention_backward(const LightningBackwardArgs& args, Launcher& launcher) {
  const Roles roles(args.q, args.log_decay, args.cu_seqlens, args.scale, launcher);
  const StateView after = state_view(args.grad_final_state);
  roles.run(args.grad_out, args.v, args.k, args.grad_q, transposed(state_view(args.initial_state)), {});
  roles.run_reversed(args.k, args.q, args.grad_out, args.grad_v, after, state_view(args.grad_initial_state));
  roles.run_reversed(args.v, args.grad_out, args.q, args.grad_k, transposed(after), {});
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
