// Launch code of paged attention on CUDA: which kernel instantiation, which grid, how much memory for partial results.
// The host knows no lengths: they are on the card, and the kernels find their work there.
#include "cuda/launch.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <sstream>

#include "cuda/check_values.h"
#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/device/quant_pages_params.h"
#include "kvk/device/sparse_pages_params.h"

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

// A format of pages (kvk/device/page_format.h), as the launch code needs it.
struct PageFormat {
  const char* header = nullptr;
  std::string type;  // the kernels' template argument; empty: dense pages
  device::Records records = {};
  bool rotated_values = false;
  std::function<device::StagedBytes(int keys)> staged = [](int) { return device::StagedBytes(); };

  PageFormat() = default;
  explicit PageFormat(const QuantPools& pools)
      : PageFormat("kvk/device/quant_attention.cuh", pools, pools.format, &device::quant_staged) {
    std::ostringstream text;
    text << "kvk::device::QuantPages<" << std::boolalpha;
    for (const QuantPart* part : {&pools.format.k, &pools.format.v}) {
      text << (part == &pools.format.v ? ", " : "") << part->bits << ", " << part->group << ", " << part->along_tokens
           << ", " << (part->rotate != 0);
    }
    type = text.str() + ">";
    const QuantLayout k = pools.format.k_layout(), v = pools.format.v_layout();
    records.k = {pools.k, pools.k_page_stride, pools.k_head_stride, {k.scale_offset, k.min_offset}};
    records.v = {pools.v, pools.v_page_stride, pools.v_head_stride, {v.scale_offset, v.min_offset}};
  }
  explicit PageFormat(const BitmapPools& pools)
      : PageFormat("kvk/device/sparse_attention.cuh", pools, pools.format, &device::bitmap_staged) {
    std::ostringstream text;
    text << "kvk::device::BitmapPages<" << std::boolalpha << pools.format.k.keep << ", " << (pools.format.k.rotate != 0)
         << ", " << pools.format.v.keep << ", " << (pools.format.v.rotate != 0) << ">";
    type = text.str();
    records.k = {pools.k, pools.k_page_stride, pools.k_head_stride, {pools.format.k_layout().bitmap_offset, 0}};
    records.v = {pools.v, pools.v_page_stride, pools.v_head_stride, {pools.format.v_layout().bitmap_offset, 0}};
  }

  PagedDecodeShape decode_shape(int head_dim, int head_dim_v, int halves, bool small) const {
    return PagedDecodeShape(head_dim, head_dim_v, halves, small, staged(PagedDecodeShape::kKeys));
  }
  PagedPrefillShape prefill_shape(int head_dim, int head_dim_v, bool small) const {
    return PagedPrefillShape(head_dim, head_dim_v, small, staged);
  }

 private:
  template <class Format, class Staged>
  PageFormat(const char* format_header, const RecordPools& pools, const Format& format, Staged staged_bytes)
      : header(format_header), rotated_values(format.v.rotate != 0) {
    records.num_pages = pools.num_pages;
    records.k_rotate_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(format.head_dim)));
    records.v_rotate_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(format.head_dim_v)));
    const int dim = static_cast<int>(format.head_dim), dim_v = static_cast<int>(format.head_dim_v);
    staged = [=, k = format.k, v = format.v](int keys) { return staged_bytes(dim, dim_v, k, v, keys); };
  }
};

// NAME<type, ARGS.., small, format>, without the last ones where they are the default. small: the shape for cards that give a
// block little shared memory.
template <class... Args>
std::string config(const char* name, DType dtype, const PageFormat& format, bool small, Args... args) {
  if (!format.type.empty()) return instance(name, dtype, args..., small ? "true" : "false", format.type);
  return small ? instance(name, dtype, args..., "true") : instance(name, dtype, args...);
}
Kernel decode_kernel(DType dtype, int head_dim, int head_dim_v, int halves, uint32_t parts, bool small = false,
                     const PageFormat& format = {}) {
  return {format.header ? format.header : kDecodeHeader,
          "kvk::device::paged_decode_kernel<" +
              config("PagedDecodeConfig", dtype, format, small, head_dim, head_dim_v, halves, parts) + ">"};
}
Kernel prefill_kernel(DType dtype, int head_dim, int head_dim_v, uint32_t parts, bool small = false,
                      const PageFormat& format = {}) {
  return {format.header ? format.header : kPrefillHeader,
          "kvk::device::paged_prefill_kernel<" +
              config("PagedPrefillConfig", dtype, format, small, head_dim, head_dim_v, parts) + ">"};
}

// Launches with the params of the format.
template <class WithRecords, class Params>
void launch_with(const PageFormat& format, Launcher& launcher, const Kernel& kernel, Dim3 grid, uint32_t threads,
                 size_t shared_bytes, const Params& params) {
  if (format.type.empty()) return launch(launcher, kernel, grid, threads, shared_bytes, params);
  WithRecords with_records = {};
  static_cast<Params&>(with_records) = params;
  with_records.records = format.records;
  launch(launcher, kernel, grid, threads, shared_bytes, with_records);
}

// Whether a block of this size needs the small shape on this card.
bool needs_small(size_t shared_bytes, const Launcher& launcher) {
  return shared_bytes > static_cast<size_t>(launcher.properties().max_shared_per_block);
}

// Streamed requests: those of few rows per kv head, split over blocks.
void launch_streamed(const PagedProblem& p, const PageFormat& format, int64_t list_entries, Launcher& launcher,
                     Workspace& workspace) {
  PagedDecodeParams params = {};
  params.problem = p;
  params.partial_rows = device::max_stream_rows(p.qo_indptr == nullptr, p.group);
  const int halves = params.partial_rows <= 8 ? 1 : 2;
  const bool small = needs_small(format.decode_shape(p.head_dim, p.head_dim_v, halves, false).shared_bytes(), launcher);
  const PagedDecodeShape shape = format.decode_shape(p.head_dim, p.head_dim_v, halves, small);
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
  launch_with<device::RecordDecodeParams>(
      format, launcher, decode_kernel(p.dtype, p.head_dim, p.head_dim_v, halves, score_parts(p), small, format),
      {static_cast<uint32_t>(pairs), slots, 1}, static_cast<uint32_t>(shape.threads()), shape.shared_bytes(), params);
  if (params.split_slots > 1) {
    launch(launcher, {kDecodeHeader, instance("merge_splits_kernel", p.dtype, p.head_dim_v)},
           {static_cast<uint32_t>(device::ceil_div<int64_t>(rows, 4)), 1, 1}, 128, 0, params);
  }
}

// The other requests: blocks of many rows, all their keys.
void launch_tiled(const PagedProblem& p, const PageFormat& format, Launcher& launcher) {
  PagedPrefillParams params = {};
  params.problem = p;
  const bool small = needs_small(format.prefill_shape(p.head_dim, p.head_dim_v, false).shared_bytes(), launcher);
  const PagedPrefillShape shape = format.prefill_shape(p.head_dim, p.head_dim_v, small);
  // Every request may leave its last tile unfilled.
  const int64_t tiles = device::ceil_div<int64_t>(p.num_tokens * p.group, shape.rows) + p.num_requests;
  launch_with<device::RecordPrefillParams>(
      format, launcher, prefill_kernel(p.dtype, p.head_dim, p.head_dim_v, score_parts(p), small, format),
      {static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.num_kv_heads), 1}, PagedPrefillShape::kThreads,
      shape.shared_bytes(), params);
  launch_clear_unowned(params, p.dtype, launcher);
}

void launch_attention(const PagedProblem& problem, const PageFormat& format, int64_t list_entries, Launcher& launcher,
                      Workspace& workspace) {
  if (problem.num_requests > 0) launch_streamed(problem, format, list_entries, launcher, workspace);
  if (problem.qo_indptr != nullptr) launch_tiled(problem, format, launcher);
}

Tensor rows_tensor(const PagedProblem& p, const RowsView& rows, int64_t dim) {
  Tensor t;
  t.data = rows.data;
  t.dtype = p.dtype;
  t.ndim = 3;
  const int64_t shape[] = {p.num_tokens, int64_t{p.num_kv_heads} * p.group, dim};
  const int64_t stride[] = {rows.token_stride, rows.head_stride, 1};
  std::copy(shape, shape + 3, t.shape);
  std::copy(stride, stride + 3, t.stride);
  return t;
}

}  // namespace

void launch_clear_unowned(const PagedPrefillParams& params, DType dtype, Launcher& launcher) {
  const device::PagedProblem& p = params.problem;
  const int64_t rows = p.num_tokens * p.num_kv_heads * p.group;
  launch(launcher, {kPrefillHeader, instance("clear_unowned_kernel", dtype, p.head_dim_v)},
         {static_cast<uint32_t>(device::ceil_div<int64_t>(rows, 4)), 1, 1}, 128, 0, params);
}

void launch_paged_attention(const PagedProblem& problem, int64_t list_entries, Launcher& launcher,
                            Workspace& workspace) {
  if (problem.num_tokens == 0) return;
  const PageFormat format = problem.quant != nullptr    ? PageFormat(*problem.quant)
                            : problem.bitmap != nullptr ? PageFormat(*problem.bitmap)
                                                        : PageFormat();
  launch_attention(problem, format, list_entries, launcher, workspace);
  if (format.rotated_values) {  // out of the space of rotated values
    const Tensor out = rows_tensor(problem, problem.out, problem.head_dim_v);
    launch_hadamard({out, {}, true, out}, launcher);
  }
}

std::string kernel_type(DType dtype) {
  return dtype == DType::bf16 ? "kvk::device::bf16" : dtype == DType::f16 ? "kvk::device::f16" : "float";
}

std::vector<Kernel> default_kernels() {
  std::vector<Kernel> kernels = {{"kvk/device/append_kv.cuh", "kvk::device::append_kv_kernel<2>"}};
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const bool small : {false, true}) {
        if (small && head_dim == 64) continue;  // the usual shape fits every card
        for (const int halves : {1, 2}) kernels.push_back(decode_kernel(dtype, head_dim, head_dim, halves, 0, small));
        kernels.push_back(prefill_kernel(dtype, head_dim, head_dim, 0, small));
      }
      kernels.push_back({kDecodeHeader, instance("merge_splits_kernel", dtype, head_dim)});
      kernels.push_back({kPrefillHeader, instance("clear_unowned_kernel", dtype, head_dim)});
    }
  }
  for (const Kernel& kernel : check_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_quant_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_sparse_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_lightning_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_grid_kernels()) kernels.push_back(kernel);
  for (const Kernel& kernel : default_linear_kernels()) kernels.push_back(kernel);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int bits : {2, 4}) {  // KIVI
      QuantPools pools = {};
      pools.format = {64, 128, 128, {bits, 32, true, 0}, {bits, 32, false, 0}};
      const PageFormat format(pools);
      kernels.push_back(decode_kernel(dtype, 128, 128, 1, 0, false, format));
      if (bits == 4) kernels.push_back(prefill_kernel(dtype, 128, 128, 0, false, format));
    }
    for (const int keep : {40, 64}) {  // Mustafar
      BitmapPools pools = {};
      pools.format = {64, 128, 128, dtype, {keep, 0}, {keep, 0}};
      const PageFormat format(pools);
      kernels.push_back(decode_kernel(dtype, 128, 128, 1, 0, false, format));
      if (keep == 64) kernels.push_back(prefill_kernel(dtype, 128, 128, 0, false, format));
    }
  }
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const char* name : {"merge_states_kernel", "merge_states_backward_kernel"}) {
      kernels.push_back({"kvk/device/merge_states.cuh", instance(name, dtype)});
    }
  }
  return kernels;
}

}  // namespace kvk::cuda
