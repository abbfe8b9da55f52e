// From a checked problem of attention to its backend.
#pragma once

#include "core/backend.h"
#include "core/paged_problem.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {

inline void run_attention(const char* op, const PagedProblem& problem, const Tensor& q, const Tensor& page_indices,
                          const Context& context) {
  by_device(
      op, q, "q", [&] { cpu::paged_attention(problem, threads_of(context)); },
      [&] { cuda::paged_attention(op, problem, page_indices.shape[page_indices.ndim - 1], q.device, context); });
}

}  // namespace kvk
