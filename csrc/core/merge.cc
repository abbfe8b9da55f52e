// Checks of merge_states and its gradient, and their way to a backend.
#include "core/backend.h"
#include "core/describe.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "kvk/paged.h"

namespace kvk {
namespace {

void check_parts(const ArgChecker& check, const Tensor& parts, const char* parts_name, const Tensor& lse,
                 const char* lse_name) {
  check.float_dtype(parts, parts_name);
  check.tensor(parts, parts_name, parts.dtype, {{"n"}, {"T"}, {"H"}, {"D"}});
  check.last_stride_one(parts, parts_name);
  check.tensor(lse, lse_name, DType::f32, {{"n", parts.shape[0]}, {"T", parts.shape[1]}, {"H", parts.shape[2]}});
}

}  // namespace

void merge_states(const MergeStatesArgs& args, const Context& context) {
  const record::Scope recorded("merge_states", context, [&] { return record::fields_of(args); });
  const ArgChecker check("merge_states", args.parts.device);
  check_parts(check, args.parts, "out", args.parts_lse, "lse");
  const int64_t T = args.parts.shape[1], H = args.parts.shape[2], D = args.parts.shape[3];
  check.tensor(args.out, "merged out", args.parts.dtype, {{"T", T}, {"H", H}, {"D", D}});
  check.last_stride_one(args.out, "merged out");
  check.writable(args.out, "merged out");
  check.tensor(args.lse, "merged lse", DType::f32, {{"T", T}, {"H", H}});
  check.writable(args.lse, "merged lse");
  by_device(
      check.op(), args.parts, "out", [&] { cpu::merge_states(args, threads_of(context)); },
      [&] { cuda::merge_states(args, context); });
}

void merge_states_backward(const MergeStatesBackwardArgs& args, const Context& context) {
  const record::Scope recorded("merge_states_backward", context, [&] { return record::fields_of(args); });
  const ArgChecker check("merge_states_backward", args.parts.device);
  check_parts(check, args.parts, "out", args.parts_lse, "lse");
  const int64_t n = args.parts.shape[0], T = args.parts.shape[1], H = args.parts.shape[2], D = args.parts.shape[3];
  check.tensor(args.grad_out, "grad_out", args.parts.dtype, {{"T", T}, {"H", H}, {"D", D}});
  check.last_stride_one(args.grad_out, "grad_out");
  check.tensor(args.grad_lse, "grad_lse", DType::f32, {{"T", T}, {"H", H}});
  check.tensor(args.grad_parts, "grad of out", args.parts.dtype, {{"n", n}, {"T", T}, {"H", H}, {"D", D}});
  check.last_stride_one(args.grad_parts, "grad of out");
  check.writable(args.grad_parts, "grad of out");
  check.tensor(args.grad_parts_lse, "grad of lse", DType::f32, {{"n", n}, {"T", T}, {"H", H}});
  check.writable(args.grad_parts_lse, "grad of lse");
  by_device(
      check.op(), args.parts, "out", [&] { cpu::merge_states_backward(args, threads_of(context)); },
      [&] { cuda::merge_states_backward(args, context); });
}

}  // namespace kvk
