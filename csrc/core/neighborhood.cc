// Checks of neighborhood attention and its gradient, and their way to a backend.
#include "kvk/neighborhood.h"

#include "core/backend.h"
#include "core/describe.h"
#include "core/grid_check.h"
#include "core/neighborhood_problem.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {
namespace {

NeighborhoodProblem check_attention(const ArgChecker& check, const NeighborhoodAttentionArgs& args,
                                    const GridGradients* gradients) {
  const int n = args.q.ndim - 3;
  if (n < 1 || n > 3) {
    fail(check.op(), "q must have shape [B, X.., Hq, D] with 1, 2 or 3 dimensions X.., got ", shape_string(args.q));
  }
  constexpr Dim kNames[] = {{"B"}, {"X"}, {"Y"}, {"Z"}};
  const std::span<const Dim> q_tokens(kNames, static_cast<size_t>(n) + 1);
  Dim k_tokens[4];
  for (int i = 0; i <= n; ++i) k_tokens[i] = {kNames[i].label, args.q.shape[i]};
  const GridArgs tensors = {args.q, args.k, args.v, args.out, args.lse, args.softmax_scale};
  NeighborhoodProblem problem;
  static_cast<GridProblem&>(problem) =
      check_grid(check, tensors, q_tokens, std::span<const Dim>(k_tokens, q_tokens.size()), gradients == nullptr);
  if (gradients != nullptr) check_grid_gradients(check, tensors, *gradients, problem);
  problem.batch = args.q.shape[0];
  for (int i = 0; i < n; ++i) {
    const NeighborhoodAxis& axis = args.axes[static_cast<size_t>(i)];
    const int64_t extent = args.q.shape[i + 1];
    const auto of = [&] { return " in dimension " + std::string(kNames[i + 1].label); };
    if (axis.kernel_size < 1) fail(check.op(), "kernel_size must be at least 1, got ", axis.kernel_size, of());
    if (axis.dilation < 1) fail(check.op(), "dilation must be at least 1, got ", axis.dilation, of());
    if (axis.stride < 1 || axis.stride > axis.kernel_size) {
      fail(check.op(), "stride must be from 1 to kernel_size=", axis.kernel_size, ", got ", axis.stride, of());
    }
    if (axis.kernel_size > extent / axis.dilation) {
      fail(check.op(), "kernel_size * dilation must be at most the extent ", extent, ", got ", axis.kernel_size, " * ",
           axis.dilation, of());
    }
    if (extent > (int64_t{1} << 31) - 1) fail(check.op(), "q: an extent must be below 2**31, got ", extent, of());
    problem.extent[3 - n + i] = extent;
    problem.axes[3 - n + i] = axis;
  }
  return problem;
}

}  // namespace

void neighborhood_attention(const NeighborhoodAttentionArgs& args, const Context& context) {
  const record::Scope recorded("neighborhood_attention", context, [&] { return record::fields_of(args); });
  const ArgChecker check("neighborhood_attention", args.q.device);
  const NeighborhoodProblem problem = check_attention(check, args, nullptr);
  by_device(
      check.op(), args.q, "q", [&] { cpu::neighborhood_attention(problem, threads_of(context)); },
      [&] { cuda::neighborhood_attention(problem, args.q.device, context); });
}

void neighborhood_attention_backward(const NeighborhoodAttentionBackwardArgs& args, const Context& context) {
  const record::Scope recorded("neighborhood_attention_backward", context, [&] { return record::fields_of(args); });
  const ArgChecker check("neighborhood_attention_backward", args.forward.q.device);
  const GridGradients gradients = {args.grad_out, args.grad_lse, args.dq, args.dk, args.dv};
  const NeighborhoodProblem problem = check_attention(check, args.forward, &gradients);
  by_device(
      check.op(), args.forward.q, "q", [&] { cpu::neighborhood_attention_backward(problem, threads_of(context)); },
      [&] { cuda::neighborhood_attention_backward(problem, args.forward.q.device, context); });
}

}  // namespace kvk
