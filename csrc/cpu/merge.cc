// merge_states on the CPU: rows for the threads.
#include "cpu/backend.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace kvk::cpu {
namespace {

// Rows of about 64 KiB of parts: less is not worth another thread.
int64_t grain(const Tensor& parts) {
  const int64_t row_bytes = parts.shape[0] * parts.shape[3] * element_size(parts.dtype);
  return 64 * 1024 / std::max<int64_t>(1, row_bytes) + 1;
}

}  // namespace

void merge_states(const MergeStatesArgs& args, Threads& threads) {
  parallel_ranges(threads, args.parts.shape[1] * args.parts.shape[2], grain(args.parts),
                  [&](int64_t begin, int64_t end) { kernels().merge_states(args, begin, end); });
}

void merge_states_backward(const MergeStatesBackwardArgs& args, Threads& threads) {
  parallel_ranges(threads, args.parts.shape[1] * args.parts.shape[2], grain(args.parts),
                  [&](int64_t begin, int64_t end) { kernels().merge_states_backward(args, begin, end); });
}

}  // namespace kvk::cpu
