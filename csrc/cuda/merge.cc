// Launch code of merge_states and its gradient.
#include "cuda/launch.h"
#include "kvk/device/merge_states_params.h"

namespace kvk::cuda {
namespace {

using device::PartsView;

PartsView parts_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }
PartsView merged_view(const Tensor& t) { return {t.data, 0, t.stride[0], t.stride[1]}; }

template <class Params>
void launch_rows(const char* name, const Tensor& parts, Launcher& launcher, Params& params) {
  params.num_parts = parts.shape[0];
  params.num_tokens = parts.shape[1];
  params.num_heads = parts.shape[2];
  params.head_dim = parts.shape[3];
  const int64_t warps = params.num_tokens * params.num_heads;
  launch(launcher,
         {"kvk/device/merge_states.cuh", std::string("kvk::device::") + name + "<" + kernel_type(parts.dtype) + ">"},
         {static_cast<uint32_t>(device::ceil_div<int64_t>(warps, 4)), 1, 1}, 128, 0, params);
}

}  // namespace

void launch_merge_states(const MergeStatesArgs& args, Launcher& launcher) {
  device::MergeStatesParams params = {};
  params.parts = parts_view(args.parts);
  params.parts_lse = parts_view(args.parts_lse);
  params.out = merged_view(args.out);
  params.lse = merged_view(args.lse);
  launch_rows("merge_states_kernel", args.parts, launcher, params);
}

void launch_merge_states_backward(const MergeStatesBackwardArgs& args, Launcher& launcher) {
  device::MergeStatesBackwardParams params = {};
  params.grad_out = merged_view(args.grad_out);
  params.grad_lse = merged_view(args.grad_lse);
  params.parts = parts_view(args.parts);
  params.parts_lse = parts_view(args.parts_lse);
  params.grad_parts = parts_view(args.grad_parts);
  params.grad_parts_lse = parts_view(args.grad_parts_lse);
  launch_rows("merge_states_backward_kernel", args.parts, launcher, params);
}

}  // namespace kvk::cuda
