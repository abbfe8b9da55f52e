// The CPU backend: checked problems in, results out.
#pragma once

#include "core/paged_problem.h"
#include "kvk/hadamard.h"
#include "kvk/paged.h"
#include "kvk/threads.h"

namespace kvk::cpu {

void paged_attention(const PagedProblem& problem, Threads& threads);
void append_kv(const AppendKvArgs& args, Threads& threads);
void merge_states(const MergeStatesArgs& args, Threads& threads);
void merge_states_backward(const MergeStatesBackwardArgs& args, Threads& threads);
void hadamard(const HadamardArgs& args, Threads& threads);

}  // namespace kvk::cpu
