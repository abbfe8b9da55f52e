// Checks of the paged ops' arguments. Each throws kvk::Error before anything is written. Page ids, lengths, starts and slots
// are checked too where the CPU can read them.
#pragma once

#include "core/paged_problem.h"
#include "kvk/paged.h"

namespace kvk {

PagedProblem check_paged_decode(const PagedDecodeArgs& args);
PagedProblem check_paged_prefill(const PagedPrefillArgs& args);
void check_append_kv(const AppendKvArgs& args);

}  // namespace kvk
