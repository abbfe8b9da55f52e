#include "cuda/check_values.h"

#include "core/value_errors.h"
#include "cuda/grid.h"
#include "kvk/device/check_values_params.h"

namespace kvk::cuda {
namespace {

using device::BadValue;

constexpr const char* kHeader = "kvk/device/check_values.cuh";
constexpr uint32_t kThreads = 512;  // of the one block: enough for debugging

Kernel table_kernel() { return {kHeader, "kvk::device::check_table_kernel<" + std::to_string(kThreads) + ">"}; }
Kernel slots_kernel() { return {kHeader, "kvk::device::check_slots_kernel<" + std::to_string(kThreads) + ">"}; }
Kernel ids_kernel() { return {kHeader, "kvk::device::check_ids_kernel<" + std::to_string(kThreads) + ">"}; }

Kernel starts_kernel() { return {kHeader, "kvk::device::check_starts_kernel<" + std::to_string(kThreads) + ">"}; }
Kernel state_slots_kernel() {
  return {kHeader, "kvk::device::check_state_slots_kernel<" + std::to_string(kThreads) + ">"};
}
Kernel pattern_kernel() { return {kHeader, "kvk::device::check_pattern_kernel<" + std::to_string(kThreads) + ">"}; }
Kernel select_kernel() { return {kHeader, "kvk::device::check_select_kernel<" + std::to_string(kThreads) + ">"}; }

template <class Params>
BadValue find_bad_value(const Kernel& kernel, Params params, Launcher& launcher, Workspace& workspace) {
  params.found = static_cast<BadValue*>(workspace.allocate(sizeof(BadValue)));
  launch(launcher, kernel, {1, 1, 1}, kThreads, 0, params);
  BadValue found;
  launcher.read(&found, params.found, sizeof found);
  return found;
}

// If what is bad is a start among `name`, that says so.
void fail_starts(const char* op, const char* name, int64_t limit, const char* of, const BadValue& bad) {
  if (bad.kind == BadValue::kFirstStart) fail_first_start(op, name, bad.value);
  if (bad.kind == BadValue::kDecreasingStart) fail_decreasing_start(op, name, bad.value, bad.other, bad.index);
  if (bad.kind == BadValue::kLastStart) fail_last_start(op, name, limit, of, bad.value);
}

}  // namespace

void check_table_values(const char* op, const PagedProblem& problem, int64_t list_entries, Launcher& launcher,
                        Workspace& workspace) {
  device::CheckTableParams params = {};
  params.problem = problem;
  params.num_pages = problem.num_pages;
  params.num_dense_pages = problem.num_dense_pages;
  params.list_entries = list_entries;
  params.mask_words = problem.mask_words;
  const BadValue bad = find_bad_value(table_kernel(), params, launcher, workspace);

  const bool of_queries = bad.of_queries != 0;
  fail_starts(op, of_queries ? "qo_indptr" : "page_indptr", of_queries ? problem.num_tokens : list_entries,
              of_queries ? "tokens of q" : "entries of page_indices", bad);
  switch (bad.kind) {
    case BadValue::kNegativeLen: fail_negative_len(op, bad.value, bad.index);
    case BadValue::kLenPastList: fail_len_past_list(op, bad.index, bad.value, bad.other, problem.page_size);
    case BadValue::kPage: fail_page(op, bad.index, "", bad.value, problem.num_pages, bad.entry);
    case BadValue::kDensePage: fail_page(op, bad.index, "dense ", bad.value, problem.num_dense_pages, bad.entry);
    case BadValue::kTag: fail_tag(op, bad.index, bad.value, bad.entry);
    case BadValue::kTokensPastMask: fail_tokens_past_mask(op, problem.mask_words, bad.index, bad.value);
    default: return;
  }
}

void check_slot_values(const AppendKvArgs& args, Launcher& launcher, Workspace& workspace) {
  const int64_t num_pages = args.k_pages.shape[0], page_size = args.k_pages.shape[1];
  device::CheckSlotsParams params = {};
  params.slots = args.slot_mapping.ptr<const int64_t>();
  params.slot_stride = args.slot_mapping.stride[0];
  params.num_tokens = args.k.shape[0];
  params.num_slots = num_pages * page_size;
  const BadValue bad = find_bad_value(slots_kernel(), params, launcher, workspace);
  if (bad.kind == BadValue::kSlot) fail_slot("append_kv", bad.index, bad.value, num_pages, page_size);
}

namespace {

device::CheckIdsParams ids_params(const Tensor& ids, int64_t limit) {
  device::CheckIdsParams params = {};
  params.ids = ids.ptr<const int32_t>();
  params.stride = ids.stride[0];
  params.count = ids.shape[0];
  params.limit = limit;
  return params;
}

void check_ids(const char* op, const Tensor& ids, const char* name, int64_t num_pages, Launcher& launcher,
               Workspace& workspace) {
  const BadValue bad = find_bad_value(ids_kernel(), ids_params(ids, num_pages), launcher, workspace);
  if (bad.kind == BadValue::kId) fail_id(op, name, num_pages, bad.value, bad.index);
}

}  // namespace

void check_quantize_ids(const QuantizePagesArgs& args, Launcher& launcher, Workspace& workspace) {
  check_ids("quantize_pages", args.src, "src", args.k_pages.shape[0], launcher, workspace);
  check_ids("quantize_pages", args.dst, "dst", args.k_pool.shape[0], launcher, workspace);
}

void check_dequantize_ids(const DequantizePagesArgs& args, Launcher& launcher, Workspace& workspace) {
  check_ids("dequantize_pages", args.ids, "ids", args.k_pool.shape[0], launcher, workspace);
}

namespace {

void check_select(const std::optional<Tensor>& select, const char* name, int64_t keep, Launcher& launcher,
                  Workspace& workspace) {
  if (!select || select->dtype == DType::f32) return;
  device::CheckSelectParams params = {};
  params.select = select->ptr<const uint8_t>();
  params.is_bitmap = select->dtype == DType::u8;
  for (int i = 0; i < 4; ++i) params.shape[i] = select->shape[i];
  for (int i = 0; i < 3; ++i) params.stride[i] = select->stride[i];
  params.keep = keep;
  const BadValue bad = find_bad_value(select_kernel(), params, launcher, workspace);
  if (bad.kind != BadValue::kSelected) return;
  const int64_t tokens = params.shape[1], heads = params.shape[2];
  fail_selected("compress_pages", name, keep, bad.value, bad.index / heads / tokens, bad.index / heads % tokens,
                bad.index % heads);
}

}  // namespace

void check_compress_values(const CompressPagesArgs& args, Launcher& launcher, Workspace& workspace) {
  check_ids("compress_pages", args.src, "src", args.k_pages.shape[0], launcher, workspace);
  check_ids("compress_pages", args.dst, "dst", args.k_pool.shape[0], launcher, workspace);
  check_select(args.k_select, "k_select", args.format.k.keep, launcher, workspace);
  check_select(args.v_select, "v_select", args.format.v.keep, launcher, workspace);
}

void check_decompress_ids(const DecompressPagesArgs& args, Launcher& launcher, Workspace& workspace) {
  check_ids("decompress_pages", args.ids, "ids", args.k_pool.shape[0], launcher, workspace);
}

namespace {

void check_starts(const char* op, const Tensor& q, const std::optional<Tensor>& cu_seqlens, Launcher& launcher,
                  Workspace& workspace) {
  if (!cu_seqlens) return;
  const int64_t tokens = q.shape[1];
  const BadValue bad = find_bad_value(starts_kernel(), ids_params(*cu_seqlens, tokens), launcher, workspace);
  fail_starts(op, "cu_seqlens", tokens, "tokens of q", bad);
}

}  // namespace

void check_lightning_starts(const LightningArgs& args, Launcher& launcher, Workspace& workspace) {
  check_starts("lightning_attention", args.q, args.cu_seqlens, launcher, workspace);
}

void check_lightning_backward_starts(const LightningBackwardArgs& args, Launcher& launcher, Workspace& workspace) {
  check_starts("lightning_attention_backward", args.q, args.cu_seqlens, launcher, workspace);
}

void check_linear_starts(const LinearAttentionArgs& args, Launcher& launcher, Workspace& workspace) {
  check_starts("linear_attention", args.q, args.cu_seqlens, launcher, workspace);
}

void check_linear_backward_starts(const LinearAttentionBackwardArgs& args, Launcher& launcher, Workspace& workspace) {
  check_starts("linear_attention_backward", args.forward.q, args.forward.cu_seqlens, launcher, workspace);
}

void check_state_slots(const LightningDecodeArgs& args, Launcher& launcher, Workspace& workspace) {
  const BadValue bad =
      find_bad_value(state_slots_kernel(), ids_params(args.slots, args.state.shape[0]), launcher, workspace);
  if (bad.kind == BadValue::kStateSlot) fail_state_slot(bad.index, bad.value, args.state.shape[0]);
  if (bad.kind == BadValue::kStateSlotAgain) fail_state_slot_again(bad.index, bad.value);
}

namespace {

void check_sequences(const char* op, const Sequences& s, const char* name, const char* of, Launcher& launcher,
                     Workspace& workspace) {
  if (s.starts == nullptr) return;
  device::CheckIdsParams params = {};
  params.ids = s.starts;
  params.stride = s.stride;
  params.count = s.count + 1;
  params.limit = s.total;
  fail_starts(op, name, s.total, of, find_bad_value(starts_kernel(), params, launcher, workspace));
}

}  // namespace

void check_block_pattern(const BlockSparseProblem& p, Launcher& launcher, Workspace& workspace) {
  const char* op = p.grad_out.data == nullptr ? "block_sparse_attention" : "block_sparse_attention_backward";
  check_sequences(op, p.queries, "cu_seqlens_q", "tokens of q", launcher, workspace);
  check_sequences(op, p.keys, "cu_seqlens_k", "tokens of k", launcher, workspace);
  device::CheckPatternParams params = {};
  params.pattern = pattern_params(p);
  params.batches = static_cast<int32_t>(p.pattern_batches());
  params.heads = static_cast<int32_t>(p.pattern_heads());
  const BadValue bad = find_bad_value(pattern_kernel(), params, launcher, workspace);
  switch (bad.kind) {
    case BadValue::kBlockRows: fail_block_rows(op, params.pattern.block_rows, bad.value, p.pattern.block_q);
    case BadValue::kRowStart: fail_row_start(op, bad.value, bad.other, bad.entry, bad.index, bad.head);
    case BadValue::kRowEnd: fail_row_end(op, params.pattern.num_entries, bad.value, bad.index, bad.head);
    case BadValue::kKeyBlock: fail_key_block(op, bad.entry, bad.value, bad.other, bad.index, bad.head);
    default: return;
  }
}

std::vector<Kernel> check_kernels() {
  return {table_kernel(),  slots_kernel(),       ids_kernel(),    select_kernel(),
          starts_kernel(), state_slots_kernel(), pattern_kernel()};
}

}  // namespace kvk::cuda
