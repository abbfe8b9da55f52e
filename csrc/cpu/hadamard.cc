// hadamard on the CPU: rows for the threads.
#include "cpu/backend.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace kvk::cpu {

void hadamard(const HadamardArgs& args, Threads& threads) {
  const Tensor& x = args.x;
  const int64_t n = x.shape[x.ndim - 1];
  // Rows of about 64 KiB: less is not worth another thread.
  const int64_t grain = 64 * 1024 / (n * element_size(x.dtype)) + 1;
  parallel_ranges(threads, x.numel() / n, grain,
                  [&](int64_t begin, int64_t end) { kernels().hadamard(args, begin, end); });
}

}  // namespace kvk::cpu
