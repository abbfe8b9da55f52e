// Launch code of normalised linear attention and its gradient.
#include "kvk/linear.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/sequences.h"
#include "kvk/device/linear_params.h"

namespace kvk::cuda {
namespace {

using device::LinearSumsParams;
using device::SequenceView;
using device::StateView;

Kernel forward_kernel(DType dtype, int64_t dk, bool floats) {
  return {"kvk/device/linear.cuh", "kvk::device::linear_forward_kernel<kvk::device::LinearConfig<" +
                                       kernel_type(dtype) + ", " + std::to_string(device::round_up<int64_t>(dk, 16)) +
                                       (floats ? ", true>>" : ", false>>")};
}

Kernel sums_kernel(DType dtype) {
  return {"kvk/device/linear_sums.cuh", "kvk::device::linear_sums_kernel<" + kernel_type(dtype) + ">"};
}

SequenceView maybe_view(const std::optional<Tensor>& t) { return t ? sequence_view(*t) : SequenceView{}; }

// f32 [N, H, Dk].
StateView vector_view(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<float>(), t->stride[0], t->stride[1], 0, 1};
}

// A float for each element of a [B, T, H, inner] tensor, beside each other.
SequenceView floats_like(const Tensor& t, int64_t inner, Workspace& workspace) {
  const int64_t heads = t.shape[2] * inner, row = t.shape[1] * heads;
  const int64_t bytes = t.shape[0] * row * int64_t{sizeof(float)};
  return {workspace.allocate(std::max<int64_t>(1, bytes)), row, heads, inner};
}

// What the kernels make of tensors of one call, each in any role.
class Roles {
 public:
  Roles(const LinearAttentionArgs& args, Launcher& launcher)
      : args_(args), launcher_(launcher), sequences_(sequence_starts(args.q, args.cu_seqlens)) {}

  // Sums over the tokens that each sees.
  struct Pass {
    const Tensor &q, &k, &v;
    SequenceView out;
    bool floats;  // out is of floats, else of q's dtype
    float scale;
    StateView initial, final;
    SequenceView den, source;
  };
  void run(const Pass& pass, bool reversed) const {
    device::LinearParams params = {};
    device::LightningParams& rows = params.rows;
    rows.sequences = sequences_;
    rows.sequences.reversed = reversed;
    const auto view = [&](const SequenceView& v, size_t element) { return from_either_end(v, reversed, element); };
    rows.q = view(sequence_view(pass.q), 2);
    rows.k = view(sequence_view(pass.k), 2);
    rows.v = view(sequence_view(pass.v), 2);
    rows.out = view(pass.out, pass.floats ? 4 : 2);
    rows.initial = pass.initial;
    rows.final = pass.final;
    rows.num_heads = static_cast<int32_t>(args_.q.shape[2]);
    rows.dk = static_cast<int32_t>(pass.q.shape[3]);
    rows.dv = static_cast<int32_t>(pass.v.shape[3]);
    rows.scale = pass.scale;
    params.den = view(pass.den, 4);
    params.source = view(pass.source, 4);
    params.eps = static_cast<float>(args_.eps);
    params.block_size = args_.block_size;
    params.causal = args_.causal;
    const device::LightningShape shape(rows.dk, device::linear_parts(args_.q.dtype == DType::bf16, pass.floats), true);
    const int64_t tiles = device::ceil_div<int64_t>(rows.dv, device::LightningShape::kColumns);
    launch(launcher_, forward_kernel(args_.q.dtype, rows.dk, pass.floats), {blocks(tiles), 1, 1},
           device::LightningShape::kThreads, shape.shared_bytes(), params);
  }

  // What both uses of the sums have in common.
  LinearSumsParams sums(LinearSumsParams::Use use) const {
    LinearSumsParams params = {};
    params.q_den = sequence_view(args_.q_den.value_or(args_.q));
    params.sequences = sequences_;
    params.num_heads = static_cast<int32_t>(args_.q.shape[2]);
    params.dk = static_cast<int32_t>(args_.q.shape[3]);
    params.use = use;
    params.scale = static_cast<float>(args_.scale);
    params.eps = static_cast<float>(args_.eps);
    params.block_size = args_.block_size;
    params.causal = args_.causal;
    params.normalize = args_.normalize;
    return params;
  }
  void run(LinearSumsParams params, bool reversed) const {
    params.sequences.reversed = reversed;
    for (SequenceView* t : {&params.rows, &params.q_den, &params.q, &params.grad, &params.grad_apart}) {
      *t = from_either_end(*t, reversed, 2);
    }
    for (SequenceView* t :
         {&params.weight, &params.den, &params.grad_den, &params.raw, &params.of_out, &params.of_den}) {
      *t = from_either_end(*t, reversed, 4);
    }
    launch(launcher_, sums_kernel(args_.q.dtype), {blocks(1), 1, 1}, device::LightningShape::kThreads, 0, params);
  }

 private:
  // The tokens behind the last packed sequence have blocks of their own.
  uint32_t blocks(int64_t tiles) const {
    const int64_t rows = sequences_.num_sequences + (sequences_.starts != nullptr ? 1 : 0);
    return static_cast<uint32_t>(rows * args_.q.shape[2] * tiles);
  }
  SequenceView from_either_end(const SequenceView& view, bool reversed, size_t element) const {
    return reversed ? reversed_view(view, sequences_.num_tokens, element) : view;
  }

  const LinearAttentionArgs& args_;
  Launcher& launcher_;
  device::SequenceStarts sequences_;
};

}  // namespace

void launch_linear_attention(const LinearAttentionArgs& args, Launcher& launcher) {
  const Roles roles(args, launcher);
  LinearSumsParams sums = roles.sums(LinearSumsParams::kDen);
  sums.rows = sequence_view(args.k_den.value_or(args.k));
  sums.den = sequence_view(args.den);
  sums.initial = vector_view(args.initial_z);
  sums.final = vector_view(args.final_z);
  roles.run(sums, false);
  roles.run({args.q,
             args.k,
             args.v,
             sequence_view(args.out),
             false,
             static_cast<float>(args.scale),
             state_view(args.initial_state),
             state_view(args.final_state),
             args.normalize ? sequence_view(args.den) : SequenceView{},
             {}},
            false);
}

// With G = dO / (den + eps) and g the gradient of den:
//   dQ = the sum over (G, V, K) with S^T, and scale * g * z           dQ_den the latter
//   dK = that over (V, G, Q) with the transposed gradient of S, and the sum of scale * g * q_den, from the last token to the first
//   dV = that over (K, Q, G) with the gradient of S, from the last token to the first
// g and G take a whole row of dQ, K's sum a whole row of q_den: so the first two go through memory, in floats.
void launch_linear_attention_backward(const LinearAttentionBackwardArgs& args, Launcher& launcher,
                                      Workspace& workspace) {
  const LinearAttentionArgs& in = args.forward;
  const Roles roles(in, launcher);
  const SequenceView raw = floats_like(in.q, in.q.shape[3], workspace);
  const SequenceView of_out = floats_like(in.q, 1, workspace), of_den = floats_like(in.q, 1, workspace);
  const StateView after = state_view(args.grad_final_state);

  roles.run({args.grad_out,
             in.v,
             in.k,
             raw,
             true,
             static_cast<float>(in.scale),
             transposed(state_view(in.initial_state)),
             {},
             {},
             {}},
            false);
  LinearSumsParams query = roles.sums(LinearSumsParams::kQuery);
  query.rows = sequence_view(in.k_den.value_or(in.k));
  query.q = sequence_view(in.q);
  query.grad_den = maybe_view(args.grad_den);
  query.raw = raw;
  query.grad = sequence_view(args.grad_q);
  query.grad_apart = maybe_view(args.grad_q_den);
  query.of_out = of_out;
  query.of_den = of_den;
  query.initial = vector_view(in.initial_z);
  roles.run(query, false);

  roles.run({in.v, args.grad_out, in.q, raw, true, 1.0f, transposed(after), {}, {}, of_out}, true);
  LinearSumsParams key = roles.sums(LinearSumsParams::kKey);
  key.rows = key.q_den;
  key.weight = of_den;
  key.raw = raw;
  key.grad = sequence_view(args.grad_k);
  key.grad_apart = maybe_view(args.grad_k_den);
  key.initial = vector_view(args.grad_final_z);
  key.final = vector_view(args.grad_initial_z);
  roles.run(key, true);

  roles.run({in.k,
             in.q,
             args.grad_out,
             sequence_view(args.grad_v),
             false,
             1.0f,
             after,
             state_view(args.grad_initial_state),
             {},
             of_out},
            true);
}

std::vector<Kernel> default_linear_kernels() {
  std::vector<Kernel> kernels;
  for (const bool floats : {false, true}) {
    for (const DType dtype : {DType::bf16, DType::f16}) kernels.push_back(forward_kernel(dtype, 128, floats));
  }
  for (const DType dtype : {DType::bf16, DType::f16}) kernels.push_back(sums_kernel(dtype));
  return kernels;
}

}  // namespace kvk::cuda
