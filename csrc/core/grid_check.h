// Checks of attention over ordinary tensors: what block-sparse, vertical-slash and neighborhood attention share.
#pragma once

#include <optional>
#include <span>

#include "core/check.h"
#include "core/grid_problem.h"

namespace kvk {

struct GridArgs {
  const Tensor &q, &k, &v, &out, &lse;
  std::optional<double> softmax_scale;
};

struct GridGradients {
  const Tensor &grad_out, &grad_lse, &dq, &dk, &dv;
};

// q_tokens, k_tokens: the dimensions before heads and channels, as the errors name them; free sizes are taken from q and k.
// out and lse are written, or, in the gradient, read.
GridProblem check_grid(const ArgChecker& check, const GridArgs& args, std::span<const Dim> q_tokens,
                       std::span<const Dim> k_tokens, bool written);
// The rest of a gradient's arguments.
void check_grid_gradients(const ArgChecker& check, const GridArgs& args, const GridGradients& gradients,
                          GridProblem& problem);

}  // namespace kvk
