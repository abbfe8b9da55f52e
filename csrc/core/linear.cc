// Checks of normalised linear attention, the Taylor map and their gradients, and their way to a backend.
#include "kvk/linear.h"

#include <vector>

#include "core/backend.h"
#include "core/describe.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {
namespace {

struct Shape {
  int64_t B, T, H, Dk, Dv, N;
};

bool on_card(const ArgChecker& check) { return check.device().type == DeviceType::cuda; }

void check_size(const ArgChecker& check, int64_t size, int64_t most, const char* name, const char* label,
                int64_t step = 1) {
  if (size >= 1 && size <= most && size % step == 0) return;
  fail(check.op(), name, ": ", label, " must be from ", step, " to ", most,
       step == 1 ? "" : " in steps of 8 on a card (zeros behind q and k change nothing)", ", got ", size);
}

// On a card f32 would need another kind of matrix instruction.
void check_dtype(const ArgChecker& check, const Tensor& q) {
  check.float_dtype(q, "q");
  if (on_card(check) && q.dtype == DType::f32) {
    fail(check.op(), "q must be bfloat16 or float16 on a card, got float32");
  }
}

void check_rows(const ArgChecker& check, const Tensor& t, const char* name, DType dtype,
                std::initializer_list<Dim> dims, bool written = false) {
  check.tensor(t, name, dtype, dims);
  check.last_stride_one(t, name);
  check.aligned_rows(t, name);
  if (written) check.writable(t, name);
}

void check_rows(const ArgChecker& check, const std::optional<Tensor>& t, const char* name, DType dtype,
                std::initializer_list<Dim> dims, bool written = false) {
  if (t) check_rows(check, *t, name, dtype, dims, written);
}

Shape check_inputs(const ArgChecker& check, const LinearAttentionArgs& args) {
  const DType dtype = args.q.dtype;
  check_dtype(check, args.q);
  const int64_t step = on_card(check) ? 8 : 1;
  check_rows(check, args.q, "q", dtype, {{"B"}, {"T"}, {"H"}, {"Dk"}});
  Shape s = {args.q.shape[0], args.q.shape[1], args.q.shape[2], args.q.shape[3], 0, args.q.shape[0]};
  check_size(check, s.Dk, kMaxLinearDim, "q", "head dim Dk", step);
  const Dim B = {"B", s.B}, T = {"T", s.T}, H = {"H", s.H}, Dk = {"Dk", s.Dk};
  check_rows(check, args.k, "k", dtype, {B, T, H, Dk});
  check_rows(check, args.v, "v", dtype, {B, T, H, {"Dv"}});
  s.Dv = args.v.shape[3];
  check_size(check, s.Dv, kMaxLinearDim, "v", "head dim Dv", step);
  check_rows(check, args.q_den, "q_den", dtype, {B, T, H, Dk});
  check_rows(check, args.k_den, "k_den", dtype, {B, T, H, Dk});
  if (args.cu_seqlens) {
    check.tensor(*args.cu_seqlens, "cu_seqlens", DType::i32, {{"N + 1"}});
    s.N = args.cu_seqlens->shape[0] - 1;
    if (s.N < 0) fail(check.op(), "cu_seqlens must have at least one entry, got none");
    if (s.B != 1) fail(check.op(), "q must have B = 1 beside cu_seqlens, got B = ", s.B);
    check.starts(*args.cu_seqlens, "cu_seqlens", s.T, "tokens of q");
  }
  check_rows(check, args.initial_state, "initial_state", DType::f32, {{"N", s.N}, H, Dk, {"Dv", s.Dv}});
  check_rows(check, args.initial_z, "initial_z", DType::f32, {{"N", s.N}, H, Dk});
  if (args.block_size < 1) fail(check.op(), "block_size must be at least 1, got ", args.block_size);
  if (!args.causal && args.block_size != 1) {
    fail(check.op(), "block_size must be 1 without causal, where every token sees all, got ", args.block_size);
  }
  check.finite(args.scale, "scale");
  check.finite(args.eps, "eps");
  if (args.eps < 0) fail(check.op(), "eps must not be negative, got ", args.eps);
  return s;
}

// A card would need kernels that do not exist.
template <class OnCpu>
void on_cpu_only(const ArgChecker& check, const Tensor& first, const char* name, const OnCpu& on_cpu) {
  by_device(check.op(), first, name, on_cpu,
            [&] { fail(check.op(), name, " must be on cpu, got ", device_name(first.device)); });
}

int64_t check_map(const ArgChecker& check, const Tensor& x) {
  check.float_dtype(x, "x");
  if (x.ndim < 1) fail(check.op(), "x must have shape [..., d], got []");
  const int64_t d = x.shape[x.ndim - 1];
  check_size(check, d, kMaxTaylorDim, "x", "the last dimension");
  check.last_stride_one(x, "x");
  return d;
}

// x's shape with the features last.
void check_features(const ArgChecker& check, const Tensor& t, const char* name, const Tensor& x, int64_t d) {
  std::vector<Dim> dims;
  for (int i = 0; i + 1 < x.ndim; ++i) dims.push_back({"...", x.shape[i]});
  dims.push_back({"1 + d + d * (d + 1) / 2", taylor_features(d)});
  check.tensor(t, name, x.dtype, dims);
  check.last_stride_one(t, name);
}

}  // namespace

void linear_attention(const LinearAttentionArgs& args, const Context& context) {
  const record::Scope recorded("linear_attention", context, [&] { return record::fields_of(args); });
  const ArgChecker check("linear_attention", args.q.device);
  const Shape s = check_inputs(check, args);
  check_rows(check, args.out, "out", args.q.dtype, {{"B", s.B}, {"T", s.T}, {"H", s.H}, {"Dv", s.Dv}}, true);
  check.tensor(args.den, "den", DType::f32, {{"B", s.B}, {"T", s.T}, {"H", s.H}});
  check.writable(args.den, "den");
  check_rows(check, args.final_state, "final_state", DType::f32, {{"N", s.N}, {"H", s.H}, {"Dk", s.Dk}, {"Dv", s.Dv}},
             true);
  check_rows(check, args.final_z, "final_z", DType::f32, {{"N", s.N}, {"H", s.H}, {"Dk", s.Dk}}, true);
  by_device(
      check.op(), args.q, "q", [&] { cpu::linear_attention(args, threads_of(context)); },
      [&] { cuda::linear_attention(args, context); });
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args, const Context& context) {
  const record::Scope recorded("linear_attention_backward", context, [&] { return record::fields_of(args); });
  const LinearAttentionArgs& in = args.forward;
  const ArgChecker check("linear_attention_backward", in.q.device);
  const Shape s = check_inputs(check, in);
  const DType dtype = in.q.dtype;
  const Dim B = {"B", s.B}, T = {"T", s.T}, N = {"N", s.N}, H = {"H", s.H}, Dk = {"Dk", s.Dk}, Dv = {"Dv", s.Dv};
  check_rows(check, args.grad_out, "grad_out", dtype, {B, T, H, Dv});
  if (args.grad_den) check.tensor(*args.grad_den, "grad_den", DType::f32, {B, T, H});
  check_rows(check, args.grad_final_state, "grad_final_state", DType::f32, {N, H, Dk, Dv});
  check_rows(check, args.grad_final_z, "grad_final_z", DType::f32, {N, H, Dk});
  if (args.grad_q_den.has_value() != in.q_den.has_value()) fail(check.op(), "grad_q_den and q_den go together");
  if (args.grad_k_den.has_value() != in.k_den.has_value()) fail(check.op(), "grad_k_den and k_den go together");
  check_rows(check, args.grad_q, "grad_q", dtype, {B, T, H, Dk}, true);
  check_rows(check, args.grad_k, "grad_k", dtype, {B, T, H, Dk}, true);
  check_rows(check, args.grad_v, "grad_v", dtype, {B, T, H, Dv}, true);
  check_rows(check, args.grad_q_den, "grad_q_den", dtype, {B, T, H, Dk}, true);
  check_rows(check, args.grad_k_den, "grad_k_den", dtype, {B, T, H, Dk}, true);
  check_rows(check, args.grad_initial_state, "grad_initial_state", DType::f32, {N, H, Dk, Dv}, true);
  check_rows(check, args.grad_initial_z, "grad_initial_z", DType::f32, {N, H, Dk}, true);
  by_device(
      check.op(), in.q, "q", [&] { cpu::linear_attention_backward(args, threads_of(context)); },
      [&] { cuda::linear_attention_backward(args, context); });
}

void taylor_feature_map(const TaylorFeatureMapArgs& args, const Context& context) {
  const record::Scope recorded("taylor_feature_map", context, [&] { return record::fields_of(args); });
  const ArgChecker check("taylor_feature_map", args.x.device);
  const int64_t d = check_map(check, args.x);
  check_features(check, args.out, "out", args.x, d);
  check.writable(args.out, "out");
  on_cpu_only(check, args.x, "x", [&] { cpu::taylor_feature_map(args, threads_of(context)); });
}

void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, const Context& context) {
  const record::Scope recorded("taylor_feature_map_backward", context, [&] { return record::fields_of(args); });
  const ArgChecker check("taylor_feature_map_backward", args.x.device);
  const int64_t d = check_map(check, args.x);
  check_features(check, args.grad, "grad", args.x, d);
  check.same_shape(args.grad_x, "grad_x", args.x, "x");
  check.last_stride_one(args.grad_x, "grad_x");
  check.writable(args.grad_x, "grad_x");
  on_cpu_only(check, args.x, "x", [&] { cpu::taylor_feature_map_backward(args, threads_of(context)); });
}

}  // namespace kvk
