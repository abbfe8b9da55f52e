// Checks of the paged ops' arguments. Each throws kvk::Error before anything is written. Page ids, lengths, starts and slots
// are checked too where the CPU can read them; on a card csrc/cuda/check_values.cc does, with KVK_CHECK=1.
#pragma once

#include "core/paged_problem.h"
#include "kvk/paged.h"

namespace kvk {

PagedProblem check_paged_decode(const PagedDecodeArgs& args);
PagedProblem check_paged_prefill(const PagedPrefillArgs& args);
// `pools` outlives the problem, which points to it.
PagedProblem check_quant_decode(const QuantDecodeArgs& args, QuantPools& pools);
PagedProblem check_quant_prefill(const QuantPrefillArgs& args, QuantPools& pools);
PagedProblem check_sparse_decode(const SparseDecodeArgs& args, BitmapPools& pools);
PagedProblem check_sparse_prefill(const SparsePrefillArgs& args, BitmapPools& pools);
void check_append_kv(const AppendKvArgs& args);

}  // namespace kvk
