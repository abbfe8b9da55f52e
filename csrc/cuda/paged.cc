// Launch code of paged attention on CUDA: which kernel instantiation, which grid, how much memory for partial results.
// The host knows no lengths: they are on the card, and the kernels find their work there.
#include "cuda/launch.h"

#include <algorithm>
#include <sstream>

#include "cuda/check_values.h"
#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_prefill_params.h"

namespace kvk::cuda {
namespace {

using device::PagedDecodeParams;
using device::PagedDecodeShape;
using device::PagedPrefillParams;
using device::PagedPrefillShape;

constexpr const char* kDecodeHeader = "kvk/device/paged_decode.cuh";
constexpr const char* kPrefillHeader = "kvk/device/paged_prefill.cuh";

// The parts of the score that this call needs (device::ScorePart).
uint32_t score_parts(const PagedProblem& p) {
  return (p.logits_soft_cap > 0 ? 1u : 0u) | (p.alibi_slopes != nullptr ? 2u : 0u) | (p.key_bias != nullptr ? 4u : 0u) |
         (p.mask_bits != nullptr ? 8u : 0u);
}

// "kvk::device::NAME<kvk::device::bf16, ARG, ..>"
template <class... Args>
std::string instance(const char* name, DType dtype, Args... args) {
  std::ostringstream text;
  text << "kvk::device::" << name << "<" << kernel_type(dtype);
  ((text << ", " << args), ...);
  text << ">";
  return text.str();
}

// small: the shape for cards that give a block little shared memory.
std::string decode_kernel(DType dtype, int head_dim, int head_dim_v, int halves, uint32_t parts, bool small = false) {
  const std::string config = small ? instance("PagedDecodeConfig", dtype, head_dim, head_dim_v, halves, parts, "true")
                                   : instance("PagedDecodeConfig", dtype, head_dim, head_dim_v, halves, parts);
  return "kvk::device::paged_decode_kernel<" + config + ">";
}
std::string prefill_kernel(DType dtype, int head_dim, int head_dim_v, uint32_t parts, bool small = false) {
  const std::string config = small ? instance("PagedPrefillConfig", dtype, head_dim, head_dim_v, parts, "true")
                                   : instance("PagedPrefillConfig", dtype, head_dim, head_dim_v, parts);
  return "kvk::device::paged_prefill_kernel<" + config + ">";
}

// Whether a block of this size needs the small shape on this card.
bool needs_small(size_t shared_bytes, const Launcher& launcher) {
  return shared_bytes > static_cast<size_t>(launcher.properties().max_shared_per_block);
}

// Streamed requests: those of few rows per kv head, split over blocks.
void launch_streamed(const PagedProblem& p, int64_t list_entries, Launcher& launcher, Workspace& workspace) {
  PagedDecodeParams params = {};
  params.problem = p;
  params.partial_rows = device::max_stream_rows(p.qo_indptr == nullptr, p.group);
  const int halves = params.partial_rows <= 8 ? 1 : 2;
  const bool small = needs_small(PagedDecodeShape(p.head_dim, p.head_dim_v, halves).shared_bytes(), launcher);
  const PagedDecodeShape shape(p.head_dim, p.head_dim_v, halves, small);
  params.row_tiles = device::ceil_div(params.partial_rows, static_cast<int32_t>(shape.rows));

  int64_t most_keys = list_entries * p.page_size;
  if (p.window_left >= 0) most_keys = std::min(most_keys, p.window_left + device::kStreamRows);
  params.split_slots = static_cast<int32_t>(std::min<int64_t>(
      device::kMaxSplits, device::ceil_div<int64_t>(std::max<int64_t>(1, most_keys), device::kMinSplitKeys)));

  const int64_t rows = int64_t{p.num_requests} * p.num_kv_heads * params.partial_rows;
  if (params.split_slots > 1) {
    const int64_t results = rows * params.split_slots;
    params.partial_out =
        static_cast<float*>(workspace.allocate(results * (p.head_dim_v + 2) * static_cast<int64_t>(sizeof(float))));
    params.partial_state = params.partial_out + results * p.head_dim_v;
  }

  // Enough blocks to fill the card four times over; beyond that a block takes several splits of its request, since an
  // empty block is not free and the host does not know which are.
  const int64_t pairs = int64_t{p.num_requests} * p.num_kv_heads * params.row_tiles;
  const int64_t wanted = device::ceil_div<int64_t>(8 * int64_t{launcher.properties().num_sms}, pairs);
  const uint32_t slots = static_cast<uint32_t>(std::clamp<int64_t>(wanted, 1, params.split_slots));
  launch(launcher, {kDecodeHeader, decode_kernel(p.dtype, p.head_dim, p.head_dim_v, halves, score_parts(p), small)},
         {static_cast<uint32_t>(pairs), slots, 1}, static_cast<uint32_t>(shape.threads()), shape.shared_bytes(),
         params);
  if (params.split_slots > 1) {
    launch(launcher, {kDecodeHeader, instance("merge_splits_kernel", p.dtype, p.head_dim_v)},
           {static_cast<uint32_t>(device::ceil_div<int64_t>(rows, 4)), 1, 1}, 128, 0, params);
  }
}

// The other requests: blocks of many rows, all their keys.
void launch_tiled(const PagedProblem& p, Launcher& launcher) {
  PagedPrefillParams params = {};
  params.problem = p;
  const bool small = needs_small(PagedPrefillShape(p.head_dim, p.head_dim_v).shared_bytes(), launcher);
  const PagedPrefillShape shape(p.head_dim, p.head_dim_v, small);
  // Every request may leave its last tile unfilled.
  const int64_t tiles = device::ceil_div<int64_t>(p.num_tokens * p.group, shape.rows) + p.num_requests;
  launch(launcher, {kPrefillHeader, prefill_kernel(p.dtype, p.head_dim, p.head_dim_v, score_parts(p), small)},
         {static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.num_kv_heads), 1}, PagedPrefillShape::kThreads,
         shape.shared_bytes(), params);
  const int64_t rows = p.num_tokens * p.num_kv_heads * p.group;
  launch(launcher, {kPrefillHeader, instance("clear_unowned_kernel", p.dtype, p.head_dim_v)},
         {static_cast<uint32_t>(device::ceil_div<int64_t>(rows, 4)), 1, 1}, 128, 0, params);
}

}  // namespace

void launch_paged_attention(const PagedProblem& problem, int64_t list_entries, Launcher& launcher,
                            Workspace& workspace) {
  if (problem.num_tokens == 0) return;
  if (problem.num_requests > 0) launch_streamed(problem, list_entries, launcher, workspace);
  if (problem.qo_indptr != nullptr) launch_tiled(problem, launcher);
}

std::string kernel_type(DType dtype) {
  return dtype == DType::bf16 ? "kvk::device::bf16" : dtype == DType::f16 ? "kvk::device::f16" : "float";
}

std::vector<Kernel> default_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const bool small : {false, true}) {
        if (small && head_dim == 64) continue;  // the usual shape fits every card
        for (const int halves : {1, 2})
          kernels.push_back({kDecodeHeader, decode_kernel(dtype, head_dim, head_dim, halves, 0, small)});
        kernels.push_back({kPrefillHeader, prefill_kernel(dtype, head_dim, head_dim, 0, small)});
      }
      kernels.push_back({kDecodeHeader, instance("merge_splits_kernel", dtype, head_dim)});
      kernels.push_back({kPrefillHeader, instance("clear_unowned_kernel", dtype, head_dim)});
    }
  }
  kernels.push_back({"kvk/device/append_kv.cuh", "kvk::device::append_kv_kernel<2>"});
  for (const Kernel& kernel : check_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_quant_kernels()) kernels.push_back(kernel);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const char* name : {"merge_states_kernel", "merge_states_backward_kernel"}) {
      kernels.push_back({"kvk/device/merge_states.cuh", instance(name, dtype)});
    }
  }
  return kernels;
}

}  // namespace kvk::cuda
