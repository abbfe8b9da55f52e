// From a call on a card to its launch code: the launcher of that card and stream, memory from the context.
#include "cuda/backend.h"

#include "core/check.h"
#include "cuda/check_values.h"
#include "cuda/driver_launcher.h"
#include "cuda/launch.h"
#include "cuda/log.h"

namespace kvk::cuda {
namespace {

class ContextWorkspace final : public Workspace {
 public:
  ContextWorkspace(const char* op, Device device, const Context& context)
      : op_(op), device_(device), context_(context) {}
  void* allocate(int64_t bytes) override {
    if (context_.allocator == nullptr)
      fail(op_, "needs ", bytes, " bytes on the card, and the context has no allocator");
    return context_.allocator->allocate(device_, bytes);
  }

 private:
  const char* op_;
  Device device_;
  const Context& context_;
};

// launch(args, launcher), with KVK_CHECK=1 behind check(args, launcher, workspace).
template <class Args, class Check, class Launch>
void run_checked(const char* op, Device device, const Args& args, const Context& context, Check&& check,
                 Launch&& launch) {
  DriverLauncher launcher(device.index, context.cuda_stream);
  if (check_mode()) {
    ContextWorkspace workspace(op, device, context);
    check(args, launcher, workspace);
  }
  launch(args, launcher);
}

}  // namespace

void paged_attention(const char* op, const PagedProblem& problem, int64_t list_entries, Device device,
                     const Context& context) {
  DriverLauncher launcher(device.index, context.cuda_stream);
  ContextWorkspace workspace(op, device, context);
  if (check_mode()) check_table_values(op, problem, list_entries, launcher, workspace);
  launch_paged_attention(problem, list_entries, launcher, workspace);
}

void append_kv(const AppendKvArgs& args, const Context& context) {
  run_checked("append_kv", args.k.device, args, context, check_slot_values, launch_append_kv);
}

void merge_states(const MergeStatesArgs& args, const Context& context) {
  DriverLauncher launcher(args.parts.device.index, context.cuda_stream);
  launch_merge_states(args, launcher);
}

void merge_states_backward(const MergeStatesBackwardArgs& args, const Context& context) {
  DriverLauncher launcher(args.parts.device.index, context.cuda_stream);
  launch_merge_states_backward(args, launcher);
}

void read_memory(Device device, void* stream, void* host, const void* from, size_t bytes) {
  DriverLauncher launcher(device.index, stream);
  if (launcher.capturing()) throw Error("nothing is read from a card while a CUDA graph is being captured");
  launcher.read(host, from, bytes);
}

void hadamard(const HadamardArgs& args, const Context& context) {
  DriverLauncher launcher(args.x.device.index, context.cuda_stream);
  launch_hadamard(args, launcher);
}

void quantize_pages(const QuantizePagesArgs& args, const Context& context) {
  run_checked("quantize_pages", args.k_pages.device, args, context, check_quantize_ids, launch_quantize_pages);
}

void dequantize_pages(const DequantizePagesArgs& args, const Context& context) {
  run_checked("dequantize_pages", args.k_pool.device, args, context, check_dequantize_ids, launch_dequantize_pages);
}

void quantize(const QuantizeArgs& args, const Context& context) {
  DriverLauncher launcher(args.x.device.index, context.cuda_stream);
  launch_quantize(args, launcher);
}

void dequantize(const DequantizeArgs& args, const Context& context) {
  DriverLauncher launcher(args.codes.device.index, context.cuda_stream);
  launch_dequantize(args, launcher);
}

void compress_pages(const CompressPagesArgs& args, const Context& context) {
  run_checked("compress_pages", args.k_pages.device, args, context, check_compress_values, launch_compress_pages);
}

void decompress_pages(const DecompressPagesArgs& args, const Context& context) {
  run_checked("decompress_pages", args.k_pool.device, args, context, check_decompress_ids, launch_decompress_pages);
}

void lightning_attention(const LightningArgs& args, const Context& context) {
  run_checked("lightning_attention", args.q.device, args, context, check_lightning_starts, launch_lightning_attention);
}

void lightning_attention_backward(const LightningBackwardArgs& args, const Context& context) {
  DriverLauncher launcher(args.q.device.index, context.cuda_stream);
  ContextWorkspace workspace("lightning_attention_backward", args.q.device, context);
  if (check_mode()) check_lightning_backward_starts(args, launcher, workspace);
  launch_lightning_attention_backward(args, launcher, workspace);
}

void linear_attention(const LinearAttentionArgs& args, const Context& context) {
  run_checked("linear_attention", args.q.device, args, context, check_linear_starts, launch_linear_attention);
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args, const Context& context) {
  DriverLauncher launcher(args.forward.q.device.index, context.cuda_stream);
  ContextWorkspace workspace("linear_attention_backward", args.forward.q.device, context);
  if (check_mode()) check_linear_backward_starts(args, launcher, workspace);
  launch_linear_attention_backward(args, launcher, workspace);
}

void lightning_decode(const LightningDecodeArgs& args, const Context& context) {
  run_checked("lightning_decode", args.q.device, args, context, check_state_slots, launch_lightning_decode);
}

void block_sparse_attention(const BlockSparseProblem& problem, Device device, const Context& context) {
  run_checked("block_sparse_attention", device, problem, context, check_block_pattern, launch_block_sparse_attention);
}

void neighborhood_attention(const NeighborhoodProblem& problem, Device device, const Context& context) {
  DriverLauncher launcher(device.index, context.cuda_stream);
  launch_neighborhood_attention(problem, launcher);
}

void block_sparse_attention_backward(const BlockSparseProblem& problem, Device device, const Context& context) {
  const char* op = "block_sparse_attention_backward";
  ContextWorkspace workspace(op, device, context);
  run_checked(op, device, problem, context, check_block_pattern, [&](const BlockSparseProblem& p, Launcher& launcher) {
    launch_block_sparse_attention_backward(p, launcher, workspace);
  });
}

void neighborhood_attention_backward(const NeighborhoodProblem& problem, Device device, const Context& context) {
  DriverLauncher launcher(device.index, context.cuda_stream);
  ContextWorkspace workspace("neighborhood_attention_backward", device, context);
  launch_neighborhood_attention_backward(problem, launcher, workspace);
}

}  // namespace kvk::cuda
