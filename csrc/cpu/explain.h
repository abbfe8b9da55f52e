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
// One pass of attention over ordinary tensors: tiles of up to `rows` rows (tokens times heads) against blocks of columns,
// `pairs` of a row and a column in all.
void explain_grid(explain::Notes& notes, const char* pass, int64_t tiles, int rows, int64_t pairs,
                  int64_t scratch_bytes, int workers);
// Lightning attention: heads of sequences, cut into `slices` of the columns of v.
void explain_chunks(explain::Notes& notes, int64_t items, int slices, int chunk_tokens, int64_t scratch_bytes,
                    int workers);

}  // namespace kvk::cpu
