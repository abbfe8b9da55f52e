// Launch code of lightning attention and its decode step.
#include "kvk/lightning.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/sequences.h"
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

Kernel decay_kernel(DType dtype, int dk) {
  return {"kvk/device/lightning_decay.cuh", "kvk::device::lightning_decay_kernel<kvk::device::LightningDecayConfig<" +
                                                kernel_type(dtype) + ", " +
                                                std::to_string(device::LightningDecayShape::tile_dim(dk)) + ">>"};
}

constexpr uint32_t kSumThreads = 256;
Kernel sum_kernel() {
  return {"kvk/device/lightning_decay.cuh", "kvk::device::sum_parts_kernel<" + std::to_string(kSumThreads) + ">"};
}

Kernel decode_kernel(DType dtype) {
  return {"kvk/device/lightning_decode.cuh", "kvk::device::lightning_decode_kernel<" + kernel_type(dtype) + ">"};
}

RowsView rows_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1]}; }

// [H] or [B, H].
DecayView decay_view(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<const float>(), t->ndim == 1 ? 0 : t->stride[0], t->stride[t->ndim - 1]};
}

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
    common_.sequences = sequence_starts(q, cu_seqlens);
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
    params.log_decay = reversed_view(params.log_decay, params.sequences.num_tokens, sizeof(float));
    launch_roles(params, 1.0f, scale_, q, k, v, out, initial, final);
  }

 private:
  void launch_roles(device::LightningParams params, float past_scale, float key_scale, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Tensor& out, const StateView& initial, const StateView& final) const {
    const auto view = [&](const Tensor& t) {
      const SequenceView of_t = sequence_view(t);
      return params.sequences.reversed ? reversed_view(of_t, params.sequences.num_tokens, 2) : of_t;
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

// A walk through the chunks from either end, whose findings are summed by another kernel.
void launch_decay_gradient(const LightningBackwardArgs& args, Launcher& launcher, Workspace& workspace) {
  const Tensor& q = args.q;
  const Tensor& grad = *args.grad_log_decay;
  const int64_t heads = q.shape[2], tokens = q.shape[1];
  const int64_t sequences = args.cu_seqlens ? args.cu_seqlens->shape[0] - 1 : q.shape[0];
  using Shape = device::LightningDecayShape;
  const int dk = static_cast<int>(q.shape[3]), dv = static_cast<int>(args.v.shape[3]);
  const Shape shape(Shape::tile_dim(dk));
  device::LightningDecayParams params = {};
  params.q = sequence_view(q);
  params.k = sequence_view(args.k);
  params.v = sequence_view(args.v);
  params.grad = sequence_view(args.grad_out);
  params.log_decay = decay_sequences(args.log_decay);
  params.initial = state_view(args.initial_state);
  params.grad_final = state_view(args.grad_final_state);
  params.sequences = sequence_starts(q, args.cu_seqlens);
  params.num_heads = static_cast<int32_t>(heads);
  params.dk = dk;
  params.dv = dv;
  params.value_tiles = device::ceil_div(dv, device::LightningShape::kColumns);
  params.tiles = Shape::tiles(dk) * params.value_tiles;
  params.scale = static_cast<float>(args.scale);
  params.row_chunks = device::ceil_div<int64_t>(tokens, device::LightningShape::kChunk);
  params.num_rows = q.shape[0];
  params.per_token = grad.ndim != 1;

  const int64_t tiles = params.tiles;
  device::SumPartsParams sum = {};
  sum.num_tokens = params.per_token ? tokens : 1;
  sum.num_heads = params.num_heads;
  sum.count = params.per_token ? q.shape[0] * tokens * heads : heads;
  sum.num_parts = params.per_token ? tiles : sequences * tiles;
  sum.warp_each = !params.per_token;
  sum.to = decay_sequences(grad);
  if (sum.count == 0) return;

  // A state for each chunk and one more for each sequence. Packed sequence n starts at (its first token) / 64 + 2 n: there are
  // never more before it.
  const int64_t chunks =
      args.cu_seqlens ? tokens / device::LightningShape::kChunk + 2 * sequences : sequences * (params.row_chunks + 1);
  const int64_t state_bytes = chunks * heads * tiles * shape.kept_floats() * int64_t{sizeof(float)};
  params.states = static_cast<float*>(workspace.allocate(std::max<int64_t>(1, state_bytes)));
  const int64_t past_bytes = tiles * q.shape[0] * tokens * heads * int64_t{sizeof(double)};
  params.past = static_cast<double*>(workspace.allocate(std::max<int64_t>(1, past_bytes)));
  const int64_t part_bytes = sum.num_parts * sum.count * int64_t{sizeof(double)};
  params.parts = static_cast<double*>(workspace.allocate(std::max<int64_t>(1, part_bytes)));
  sum.parts = params.parts;
  const int64_t rows = sequences + (args.cu_seqlens ? 1 : 0);
  launch(launcher, decay_kernel(q.dtype, dk), {static_cast<uint32_t>(rows * heads * tiles), 1, 1},
         device::LightningShape::kThreads, shape.shared_bytes(), params);
  const int64_t threads = sum.count * (sum.warp_each ? 32 : 1);
  launch(launcher, sum_kernel(), {grid_size(device::ceil_div<int64_t>(threads, kSumThreads)), 1, 1}, kSumThreads, 0,
         sum);
}

}  // namespace

void launch_lightning_attention(const LightningArgs& args, Launcher& launcher) {
  const Roles roles(args.q, args.log_decay, args.cu_seqlens, args.scale, launcher);
  roles.run(args.q, args.k, args.v, args.out, state_view(args.initial_state), state_view(args.final_state));
}

// With S the state before a token and R the gradient of the state after it:
//   dQ = lightning attention of (dO, V, K) with S^T
//   dV = that of (K, Q, dO) with R, dK of (V, dO, Q) with R^T, from the last token to the first
// Three passes, each of which makes its states anew: a fifth more FLOPs than two would take, and nothing is kept.
void launch_lightning_attention_backward(const LightningBackwardArgs& args, Launcher& launcher, Workspace& workspace) {
  const Roles roles(args.q, args.log_decay, args.cu_seqlens, args.scale, launcher);
  const StateView after = state_view(args.grad_final_state);
  roles.run(args.grad_out, args.v, args.k, args.grad_q, transposed(state_view(args.initial_state)), {});
  roles.run_reversed(args.k, args.q, args.grad_out, args.grad_v, after, state_view(args.grad_initial_state));
  roles.run_reversed(args.v, args.grad_out, args.q, args.grad_k, transposed(after), {});
  if (args.grad_log_decay) launch_decay_gradient(args, launcher, workspace);
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
    for (const int dk : {64, 128}) kernels.push_back(decay_kernel(dtype, dk));
    kernels.push_back(decode_kernel(dtype));
  }
  kernels.push_back(sum_kernel());
  return kernels;
}

}  // namespace kvk::cuda
