// What a CPU call would do, as steps of an explanation.
#pragma once

#include <cstdint>

#include "core/explain.h"
#include "core/paged_problem.h"
#include "cpu/plan.h"

namespace kvk::cpu {

// `pieces` of work for `workers` threads.
void explain_loop(explain::Notes& notes, int64_t pieces, int workers);
void explain_attention(explain::Notes& notes, const PagedProblem& problem, const Plan& plan, int workers,
                       int64_t scratch_bytes);

}  // namespace kvk::cpu
