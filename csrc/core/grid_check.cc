#include "core/grid_check.h"

#include <cmath>
#include <vector>

namespace kvk {
namespace {

// t[tokens..., heads(, channels)]: the batch, then the other dimensions of tokens, the last one last.
GridView grid_view(const Tensor& t, int tokens) {
  GridView view;
  view.data = t.data;
  if (tokens > 1) view.stride[0] = t.stride[0];
  for (int i = tokens - 1, to = kGridDims - 1; i >= (tokens > 1 ? 1 : 0); --i, --to) view.stride[to] = t.stride[i];
  view.head_stride = t.stride[tokens];
  return view;
}

std::vector<Dim> with(std::span<const Dim> tokens, std::initializer_list<Dim> more) {
  std::vector<Dim> dims(tokens.begin(), tokens.end());
  dims.insert(dims.end(), more);
  return dims;
}

// The same dimensions with the sizes that t has.
std::vector<Dim> sized(std::span<const Dim> tokens, const Tensor& t) {
  std::vector<Dim> dims(tokens.begin(), tokens.end());
  for (size_t i = 0; i < dims.size(); ++i) dims[i].size = t.shape[i];
  return dims;
}

}  // namespace

GridProblem check_grid(const ArgChecker& check, const GridArgs& args, std::span<const Dim> q_tokens,
                       std::span<const Dim> k_tokens, bool written) {
  const DType dtype = args.q.dtype;
  const int n = static_cast<int>(q_tokens.size());
  check.float_dtype(args.q, "q");
  check.no_f32_on_card(args.q, "q");
  check.tensor(args.q, "q", dtype, with(q_tokens, {{"Hq"}, {"D"}}));
  const int64_t num_q_heads = args.q.shape[n], head_dim = args.q.shape[n + 1];
  check.head_dim(head_dim, "q", "D");
  check.tensor(args.k, "k", dtype, with(k_tokens, {{"Hkv"}, {"D", head_dim}}));
  const int64_t num_kv_heads = args.k.shape[n];
  const std::vector<Dim> q_sizes = sized(q_tokens, args.q), k_sizes = sized(k_tokens, args.k);
  check.tensor(args.v, "v", dtype, with(k_sizes, {{"Hkv", num_kv_heads}, {"Dv"}}));
  const int64_t head_dim_v = args.v.shape[n + 1];
  check.head_dim(head_dim_v, "v", "Dv");
  if (num_kv_heads < 1) fail(check.op(), "k must have at least one kv head, got ", num_kv_heads);
  if (num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
    fail(check.op(), "q: the number of query heads must be a multiple of the ", num_kv_heads, " kv heads of k, got ",
         num_q_heads);
  }
  check.tensor(args.out, "out", dtype, with(q_sizes, {{"Hq", num_q_heads}, {"Dv", head_dim_v}}));
  check.tensor(args.lse, "lse", DType::f32, with(q_sizes, {{"Hq", num_q_heads}}));
  for (const auto& [t, name] : {std::pair(&args.q, "q"), {&args.k, "k"}, {&args.v, "v"}, {&args.out, "out"}}) {
    check.last_stride_one(*t, name);
  }
  for (const auto& [t, name] : {std::pair(&args.q, "q"), {&args.k, "k"}, {&args.v, "v"}}) check.aligned_rows(*t, name);
  if (written) {
    check.writable(args.out, "out");
    check.writable(args.lse, "lse");
  }
  const double scale = args.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  check.finite(scale, "softmax_scale");

  GridProblem problem;
  problem.dtype = dtype;
  problem.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  problem.group = static_cast<int32_t>(num_q_heads / num_kv_heads);
  problem.head_dim = static_cast<int32_t>(head_dim);
  problem.head_dim_v = static_cast<int32_t>(head_dim_v);
  problem.softmax_scale = static_cast<float>(scale);
  problem.q = grid_view(args.q, n);
  problem.k = grid_view(args.k, n);
  problem.v = grid_view(args.v, n);
  problem.out = grid_view(args.out, n);
  problem.lse = grid_view(args.lse, n);
  return problem;
}

void check_grid_gradients(const ArgChecker& check, const GridArgs& args, const GridGradients& gradients,
                          GridProblem& problem) {
  const int n = args.q.ndim - 2;
  check.same_shape(gradients.grad_out, "grad_out", args.out, "out");
  check.last_stride_one(gradients.grad_out, "grad_out");
  check.aligned_rows(gradients.grad_out, "grad_out");
  check.aligned_rows(args.out, "out");
  check.same_shape(gradients.grad_lse, "grad_lse", args.lse, "lse");
  const auto written = [&](const Tensor& t, const char* name, const Tensor& as, const char* as_name) {
    check.same_shape(t, name, as, as_name);
    check.last_stride_one(t, name);
    check.aligned_rows(t, name);
    check.writable(t, name);
    return grid_view(t, n);
  };
  problem.dq = written(gradients.dq, "dq", args.q, "q");
  problem.dk = written(gradients.dk, "dk", args.k, "k");
  problem.dv = written(gradients.dv, "dv", args.v, "v");
  problem.grad_out = grid_view(gradients.grad_out, n);
  problem.grad_lse = grid_view(gradients.grad_lse, n);
}

}  // namespace kvk
