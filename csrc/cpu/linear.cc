// Normalised linear attention and the Taylor map on the CPU: heads of sequences, columns of v, rows for the threads.
#include "cpu/backend.h"

#include <vector>

#include "cpu/levels.h"
#include "cpu/lightning_work.h"
#include "cpu/parallel.h"

namespace kvk::cpu {
namespace {

// A contiguous copy: the first slice of a head writes final_z, which may be initial_z, while others still read.
class CopyOfZ {
 public:
  explicit CopyOfZ(std::optional<Tensor>& z) {
    if (!z) return;
    const Tensor from = *z;
    floats_.resize(static_cast<size_t>(from.numel()));
    Tensor& to = *z;
    to.data = floats_.data();
    to.stride[2] = 1;
    to.stride[1] = to.shape[2];
    to.stride[0] = to.shape[1] * to.shape[2];
    for (int64_t n = 0; n < to.shape[0]; ++n) {
      for (int64_t h = 0; h < to.shape[1]; ++h) {
        std::copy_n(from.ptr<const float>() + n * from.stride[0] + h * from.stride[1], to.shape[2],
                    to.ptr<float>() + n * to.stride[0] + h * to.stride[1]);
      }
    }
  }

 private:
  std::vector<float> floats_;
};

// Rows of a feature map: of about 64 KiB at the least.
template <class Call>
void each_row(const Tensor& x, Threads& threads, const Call& call) {
  const int64_t d = x.shape[x.ndim - 1];
  const int64_t grain = 64 * 1024 / (taylor_features(d) * element_size(x.dtype)) + 1;
  parallel_ranges(threads, x.numel() / d, grain, call);
}

}  // namespace

void linear_attention(const LinearAttentionArgs& args, Threads& threads) {
  const Kernels& level = kernels();
  const int dk = static_cast<int>(args.q.shape[3]), dv = static_cast<int>(args.v.shape[3]);
  const int workers = workers_for(args.q, args.v, threads);
  const int slices = slices_for(args.final_state.shape[0] * args.q.shape[2], workers, dv);
  const auto items = items_of(args.q, args.v, args.cu_seqlens, slices);
  const int64_t scratch_floats = level.linear_scratch_floats(dk, dv);
  if (explained(items, slices, scratch_floats, workers)) return;
  LinearAttentionArgs sliced = args;
  const CopyOfZ copy(sliced.initial_z);
  const Scratch scratch(scratch_floats, workers);
  parallel_items(threads, workers, static_cast<int64_t>(items.size()), [&](int worker, int64_t i) {
    level.linear_forward(sliced, items[static_cast<size_t>(i)], scratch.of(worker));
  });
  clear_unowned(args.out, args.cu_seqlens);
  clear_unowned(args.den, args.cu_seqlens);
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args, Threads& threads) {
  const Kernels& level = kernels();
  const LinearAttentionArgs& in = args.forward;
  const int workers = workers_for(in.q, in.v, threads);
  const auto items = items_of(in.q, in.v, in.cu_seqlens, 1);
  const int64_t scratch_floats =
      level.linear_scratch_floats(static_cast<int>(in.q.shape[3]), static_cast<int>(in.v.shape[3]));
  if (explained(items, 1, scratch_floats, workers)) return;
  const Scratch scratch(scratch_floats, workers);
  parallel_items(threads, workers, static_cast<int64_t>(items.size()), [&](int worker, int64_t i) {
    level.linear_backward(args, items[static_cast<size_t>(i)], scratch.of(worker));
  });
  for (const auto& grad : {std::optional(args.grad_q), std::optional(args.grad_k), std::optional(args.grad_v),
                           args.grad_q_den, args.grad_k_den}) {
    if (grad) clear_unowned(*grad, in.cu_seqlens);
  }
}

void taylor_feature_map(const TaylorFeatureMapArgs& args, Threads& threads) {
  each_row(args.x, threads, [&](int64_t begin, int64_t end) { kernels().taylor_feature_map(args, begin, end); });
}

void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, Threads& threads) {
  each_row(args.x, threads,
           [&](int64_t begin, int64_t end) { kernels().taylor_feature_map_backward(args, begin, end); });
}

}  // namespace kvk::cpu
