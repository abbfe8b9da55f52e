// Checks of lightning attention, its gradient and its decode step, and their way to a backend.
#include "kvk/lightning.h"

#include <vector>

#include "core/backend.h"
#include "core/describe.h"
#include "core/value_errors.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {
namespace {

struct Shape {
  int64_t B, T, H, Dk, Dv, N;
};

void check_dim(const ArgChecker& check, int64_t size, const char* name, const char* label) {
  const int64_t step = check.device().type == DeviceType::cuda ? 8 : 1;
  if (size >= 1 && size <= kMaxLightningDim && size % step == 0) return;
  fail(check.op(), name, ": head dim ", label, " must be from ", step, " to ", kMaxLightningDim,
       step == 1 ? "" : " in steps of 8 on a card", ", got ", size);
}

void check_rows(const ArgChecker& check, const Tensor& t, const char* name) {
  check.last_stride_one(t, name);
  check.aligned_rows(t, name);
}

void check_dtype(const ArgChecker& check, const Tensor& q) {
  check.float_dtype(q, "q");
  check.no_f32_on_card(q, "q");
}

// q, k, v and, read on the CPU alone, the starts of the sequences.
Shape check_inputs(const ArgChecker& check, const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& cu_seqlens) {
  check_dtype(check, q);
  check.tensor(q, "q", q.dtype, {{"B"}, {"T"}, {"H"}, {"Dk"}});
  Shape s = {q.shape[0], q.shape[1], q.shape[2], q.shape[3], 0, q.shape[0]};
  check_dim(check, s.Dk, "q", "Dk");
  check_rows(check, q, "q");
  check.tensor(k, "k", q.dtype, {{"B", s.B}, {"T", s.T}, {"H", s.H}, {"Dk", s.Dk}});
  check_rows(check, k, "k");
  check.tensor(v, "v", q.dtype, {{"B", s.B}, {"T", s.T}, {"H", s.H}, {"Dv"}});
  s.Dv = v.shape[3];
  check_dim(check, s.Dv, "v", "Dv");
  check_rows(check, v, "v");
  if (!cu_seqlens) return s;
  check.tensor(*cu_seqlens, "cu_seqlens", DType::i32, {{"N + 1"}});
  s.N = cu_seqlens->shape[0] - 1;
  if (s.N < 0) fail(check.op(), "cu_seqlens must have at least one entry, got none");
  if (s.B != 1) fail(check.op(), "q must have B = 1 beside cu_seqlens, got B = ", s.B);
  if (check.device().type != DeviceType::cpu) return s;
  int64_t previous = 0;
  for (int64_t n = 0; n <= s.N; ++n) {
    const int64_t start = cu_seqlens->ptr<const int32_t>()[n * cu_seqlens->stride[0]];
    if (n == 0 && start != 0) fail_first_start(check.op(), "cu_seqlens", start);
    if (start < previous) fail_decreasing_start(check.op(), "cu_seqlens", start, previous, n);
    previous = start;
  }
  if (previous > s.T) fail_last_start(check.op(), "cu_seqlens", s.T, "tokens of q", previous);
  return s;
}

// Shape, and on the CPU the sign: a positive log decay would grow past all bounds.
void check_decay(const ArgChecker& check, const std::optional<Tensor>& decay, const char* name,
                 std::initializer_list<Dim> per_token, int64_t H) {
  if (!decay) return;
  if (decay->ndim == 1) {
    check.tensor(*decay, name, DType::f32, {{"H", H}});
  } else {
    check.tensor(*decay, name, DType::f32, per_token);
  }
  if (check.device().type != DeviceType::cpu) return;
  const Tensor& t = *decay;
  for (int64_t i = 0; i < t.numel(); ++i) {
    int64_t rest = i, at = 0;
    for (int d = t.ndim - 1; d >= 0; --d) {
      at += rest % t.shape[d] * t.stride[d];
      rest /= t.shape[d];
    }
    if (t.ptr<const float>()[at] > 0.0f) {
      fail(check.op(), name, " must not be positive, got ", t.ptr<const float>()[at], " at element ", i);
    }
  }
}

void check_state(const ArgChecker& check, const Tensor& state, const char* name, const Shape& s) {
  check.tensor(state, name, DType::f32, {{"N", s.N}, {"H", s.H}, {"Dk", s.Dk}, {"Dv", s.Dv}});
  check_rows(check, state, name);
}

void check_written(const ArgChecker& check, const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
  check.same_shape(t, name, as, as_name);
  check_rows(check, t, name);
  check.writable(t, name);
}

}  // namespace

void lightning_attention(const LightningArgs& args, const Context& context) {
  const record::Scope recorded("lightning_attention", context, [&] { return record::fields_of(args); });
  const ArgChecker check("lightning_attention", args.q.device);
  const Shape s = check_inputs(check, args.q, args.k, args.v, args.cu_seqlens);
  check_decay(check, args.log_decay, "log_decay", {{"B", s.B}, {"T", s.T}, {"H", s.H}}, s.H);
  check.finite(args.scale, "scale");
  if (args.initial_state) check_state(check, *args.initial_state, "initial_state", s);
  check_written(check, args.out, "out", args.v, "v");
  check_state(check, args.final_state, "final_state", s);
  check.writable(args.final_state, "final_state");
  by_device(
      check.op(), args.q, "q", [&] { cpu::lightning_attention(args, threads_of(context)); },
      [&] { cuda::lightning_attention(args, context); });
}

void lightning_attention_backward(const LightningBackwardArgs& args, const Context& context) {
  const record::Scope recorded("lightning_attention_backward", context, [&] { return record::fields_of(args); });
  const ArgChecker check("lightning_attention_backward", args.q.device);
  const Shape s = check_inputs(check, args.q, args.k, args.v, args.cu_seqlens);
  check.same_shape(args.grad_out, "grad_out", args.v, "v");
  check_rows(check, args.grad_out, "grad_out");
  if (args.grad_final_state) check_state(check, *args.grad_final_state, "grad_final_state", s);
  check_decay(check, args.log_decay, "log_decay", {{"B", s.B}, {"T", s.T}, {"H", s.H}}, s.H);
  check.finite(args.scale, "scale");
  if (args.initial_state) check_state(check, *args.initial_state, "initial_state", s);
  check_written(check, args.grad_q, "grad_q", args.q, "q");
  check_written(check, args.grad_k, "grad_k", args.k, "k");
  check_written(check, args.grad_v, "grad_v", args.v, "v");
  if (args.grad_log_decay) {
    if (!args.log_decay) fail(check.op(), "grad_log_decay: there is no log_decay");
    check.same_shape(*args.grad_log_decay, "grad_log_decay", *args.log_decay, "log_decay");
    check.writable(*args.grad_log_decay, "grad_log_decay");
  }
  if (args.grad_initial_state) {
    check_state(check, *args.grad_initial_state, "grad_initial_state", s);
    check.writable(*args.grad_initial_state, "grad_initial_state");
  }
  by_device(
      check.op(), args.q, "q", [&] { cpu::lightning_attention_backward(args, threads_of(context)); },
      [&] { cuda::lightning_attention_backward(args, context); });
}

void lightning_decode(const LightningDecodeArgs& args, const Context& context) {
  const record::Scope recorded("lightning_decode", context, [&] { return record::fields_of(args); });
  const ArgChecker check("lightning_decode", args.q.device);
  const Tensor& q = args.q;
  check.float_dtype(q, "q");
  check.tensor(q, "q", q.dtype, {{"B"}, {"H"}, {"Dk"}});
  const int64_t B = q.shape[0], H = q.shape[1], Dk = q.shape[2];
  check_dim(check, Dk, "q", "Dk");
  check_rows(check, q, "q");
  check.tensor(args.k, "k", q.dtype, {{"B", B}, {"H", H}, {"Dk", Dk}});
  check_rows(check, args.k, "k");
  check.tensor(args.v, "v", q.dtype, {{"B", B}, {"H", H}, {"Dv"}});
  const int64_t Dv = args.v.shape[2];
  check_dim(check, Dv, "v", "Dv");
  check_rows(check, args.v, "v");
  check.tensor(args.state, "state", DType::f32, {{"S"}, {"H", H}, {"Dk", Dk}, {"Dv", Dv}});
  check_rows(check, args.state, "state");
  check.writable(args.state, "state");
  check.tensor(args.slots, "slots", DType::i32, {{"B", B}});
  check_decay(check, args.log_decay, "log_decay", {{"B", B}, {"H", H}}, H);
  check.finite(args.scale, "scale");
  check_written(check, args.out, "out", args.v, "v");
  if (q.device.type == DeviceType::cpu) {
    std::vector<bool> taken(static_cast<size_t>(args.state.shape[0]));
    for (int64_t b = 0; b < B; ++b) {
      const int64_t slot = args.slots.ptr<const int32_t>()[b * args.slots.stride[0]];
      if (slot < 0) continue;
      if (slot >= args.state.shape[0]) fail_state_slot(b, slot, args.state.shape[0]);
      if (taken[static_cast<size_t>(slot)]) fail_state_slot_again(b, slot);
      taken[static_cast<size_t>(slot)] = true;
    }
  }
  by_device(
      check.op(), q, "q", [&] { cpu::lightning_decode(args, threads_of(context)); },
      [&] { cuda::lightning_decode(args, context); });
}

}  // namespace kvk
