// Lightning attention on the CPU: heads of sequences for the threads, and columns of v where those are few.
#include "cpu/backend.h"

#include <algorithm>
#include <vector>

#include "cpu/levels.h"
#include "cpu/lightning_work.h"
#include "cpu/parallel.h"

namespace kvk::cpu {

void lightning_attention(const LightningArgs& args, Threads& threads) {
  const Kernels& level = kernels();
  const int dk = static_cast<int>(args.q.shape[3]), dv = static_cast<int>(args.v.shape[3]);
  const int workers = workers_for(args.q, args.v, threads);
  const int64_t heads = args.final_state.shape[0] * args.q.shape[2];
  const int slices = slices_for(heads, workers, dv);
  const auto items = items_of(args.q, args.v, args.cu_seqlens, slices);
  const int64_t scratch_floats = level.lightning_scratch_floats(dk, dv);
  if (explained(items, slices, scratch_floats, workers)) return;
  const Scratch scratch(scratch_floats, workers);
  parallel_items(threads, workers, static_cast<int64_t>(items.size()), [&](int worker, int64_t i) {
    level.lightning_forward(args, items[static_cast<size_t>(i)], scratch.of(worker));
  });
  clear_unowned(args.out, args.cu_seqlens);
}

void lightning_attention_backward(const LightningBackwardArgs& args, Threads& threads) {
  const Kernels& level = kernels();
  const int dk = static_cast<int>(args.q.shape[3]), dv = static_cast<int>(args.v.shape[3]);
  const int workers = workers_for(args.q, args.v, threads);
  const auto items = items_of(args.q, args.v, args.cu_seqlens, 1);
  const int64_t heads = args.q.shape[2];
  // Decays per head get one sum of each sequence, added in the order of the sequences.
  const bool per_head = args.grad_log_decay && args.grad_log_decay->ndim == 1;
  std::vector<double> sums(per_head ? items.size() : 0);
  const int64_t scratch_floats = level.lightning_backward_scratch_floats(dk, dv);
  if (explained(items, 1, scratch_floats, workers)) return;
  const Scratch scratch(scratch_floats, workers);
  parallel_items(threads, workers, static_cast<int64_t>(items.size()), [&](int worker, int64_t i) {
    const LightningItem& item = items[static_cast<size_t>(i)];
    double* sum = per_head ? &sums[static_cast<size_t>(item.sequence * heads + item.head)] : nullptr;
    level.lightning_backward(args, item, scratch.of(worker), sum);
  });
  if (per_head) {
    for (int64_t h = 0; h < heads; ++h) {
      double sum = 0.0;
      for (size_t i = static_cast<size_t>(h); i < sums.size(); i += static_cast<size_t>(heads)) sum += sums[i];
      args.grad_log_decay->ptr<float>()[h * args.grad_log_decay->stride[0]] = static_cast<float>(sum);
    }
  } else if (args.grad_log_decay) {
    clear_unowned(*args.grad_log_decay, args.cu_seqlens);
  }
  for (const Tensor& grad : {args.grad_q, args.grad_k, args.grad_v}) clear_unowned(grad, args.cu_seqlens);
}

void lightning_decode(const LightningDecodeArgs& args, Threads& threads) {
  const int64_t state_bytes = args.q.shape[2] * args.v.shape[2] * int64_t{sizeof(float)};
  parallel_ranges(threads, args.q.shape[0] * args.q.shape[1], 128 * 1024 / std::max<int64_t>(1, state_bytes) + 1,
                  [&](int64_t begin, int64_t end) { kernels().lightning_decode(args, begin, end); });
}

}  // namespace kvk::cpu
