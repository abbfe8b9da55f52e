// Launch code of block-sparse attention. The host knows no lengths and no lists: the kernels find their work on the card.
#include <algorithm>

#include "cuda/grid.h"
#include "kvk/device/block_sparse_params.h"

namespace kvk::cuda {
namespace {

using device::BlockSparse;
using device::ceil_div;

template <class E>
device::SharedLists<E> shared_lists(const Tensor& t) {
  return {t.ptr<const E>(), t.shape[0] > 1 ? t.stride[0] : 0, t.shape[1] > 1 ? t.stride[1] : 0, t.stride[2]};
}

device::PackedSequences packed(const Sequences& s) {
  return {s.starts, s.stride, static_cast<int32_t>(s.count), static_cast<int32_t>(s.total)};
}

// Blocks of `size` tokens, at most: every sequence may leave its last one short.
int64_t most_blocks(const Sequences& s, int64_t size) {
  return ceil_div(s.total, size) + (s.starts != nullptr ? s.count : 0);
}

uint32_t score_parts(const BlockSparseProblem& p) { return p.pattern.entry_bias ? 4 : 0; }  // device::kKeyBias

// Tokens of no sequence: 0, and -inf where there is an lse.
void clear_unowned(const BlockSparseProblem& p, const Sequences& sequences, const GridView& rows, const GridView& lse,
                   int32_t group, int32_t dim, Launcher& launcher) {
  if (sequences.starts == nullptr) return;
  constexpr int kTokens = device::kGridDims - 1;
  device::PagedPrefillParams params = {};
  params.problem.num_requests = static_cast<int32_t>(sequences.count);
  params.problem.qo_indptr = sequences.starts;
  params.problem.qo_indptr_stride = sequences.stride;
  params.problem.num_tokens = sequences.total;
  params.problem.num_kv_heads = p.num_kv_heads;
  params.problem.group = group;
  params.problem.head_dim_v = dim;
  params.problem.out = {rows.data, rows.stride[kTokens], rows.head_stride};
  params.problem.lse = static_cast<float*>(lse.data);
  params.problem.lse_token_stride = lse.stride[kTokens];
  params.problem.lse_head_stride = lse.head_stride;
  launch_clear_unowned(params, p.dtype, launcher);
}

}  // namespace

Kernel transpose_kernel() {
  return {"kvk/device/block_sparse_transpose.cuh",
          "kvk::device::block_transpose_kernel<" + std::to_string(device::kTransposeThreads) + ">"};
}

device::BlockSparseParams pattern_params(const BlockSparseProblem& p) {
  device::BlockSparseParams params = {};
  params.queries = packed(p.queries);
  params.keys = packed(p.keys);
  params.row_ptr = shared_lists<int32_t>(p.pattern.row_ptr);
  params.col_idx = shared_lists<int32_t>(p.pattern.col_idx);
  if (p.pattern.entry_bias) params.entry_bias = shared_lists<float>(*p.pattern.entry_bias);
  params.num_entries = p.pattern.col_idx.shape[2];
  params.block_rows = static_cast<int32_t>(p.pattern.row_ptr.shape[2] - 1);
  params.block_q = static_cast<int32_t>(p.pattern.block_q);
  params.block_k = static_cast<int32_t>(p.pattern.block_k);
  params.heads = p.pattern_heads() > 1 ? 1 : p.group;
  params.causal = p.causal;
  return params;
}

void launch_block_sparse_attention(const BlockSparseProblem& p, Launcher& launcher) {
  auto params = grid_params<BlockSparse>(p);
  params.schedule = pattern_params(p);
  const int64_t rows = p.pattern.block_q * params.schedule.heads;  // of a query block
  const bool small = rows <= 64 || needs_small_grid<BlockSparse>(p, launcher);
  const device::GridShape shape = grid_shape<BlockSparse>(p, small);
  const int64_t tiles = most_blocks(p.queries, p.pattern.block_q) * ceil_div<int64_t>(rows, shape.rows);
  launch(launcher, grid_kernel("BlockSparse", p.dtype, p.head_dim, p.head_dim_v, score_parts(p), small),
         {static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.num_heads() / params.schedule.heads), 1},
         device::GridShape::kThreads, shape.shared_bytes(), params);
  clear_unowned(p, p.queries, p.out, p.lse, p.group, p.head_dim_v, launcher);
}

namespace {

// The pattern's lists by key blocks, in new memory.
void transpose(const BlockSparseProblem& p, device::BlockSparseParams& pattern, Launcher& launcher,
               Workspace& workspace) {
  const int64_t lists = p.pattern_batches() * p.pattern_heads(), entries = pattern.num_entries;
  const int64_t columns = ceil_div(p.keys.total, p.pattern.block_k);  // of the longest sequence, at most
  pattern.block_columns = static_cast<int32_t>(columns);
  const auto allocate = [&](int64_t count, size_t size) {
    return workspace.allocate(std::max<int64_t>(1, lists * count) * static_cast<int64_t>(size));
  };
  device::BlockTransposeParams params = {};
  params.pattern = pattern;
  params.heads = static_cast<int32_t>(p.pattern_heads());
  params.starts = static_cast<int32_t*>(allocate(columns + 1, sizeof(int32_t)));
  params.entries = static_cast<device::BlockEntry*>(allocate(entries, sizeof(device::BlockEntry)));
  const auto strides = [&](int64_t of_batch, bool shared) { return shared ? 0 : of_batch; };
  const bool one_batch = p.pattern_batches() == 1, one_head = p.pattern_heads() == 1;
  pattern.column_starts = {params.starts, strides(p.pattern_heads() * (columns + 1), one_batch),
                           strides(columns + 1, one_head), 1};
  pattern.column_entries = {params.entries, strides(p.pattern_heads() * entries, one_batch), strides(entries, one_head),
                            1};
  launch(launcher, transpose_kernel(), {static_cast<uint32_t>(lists), 1, 1}, device::kTransposeThreads, 0, params);
}

}  // namespace

void launch_block_sparse_attention_backward(const BlockSparseProblem& p, Launcher& launcher, Workspace& workspace) {
  const device::GridView state = launch_grid_state(p, {1, 1, 1, p.queries.total}, launcher, workspace);
  device::BlockSparseParams pattern = pattern_params(p);
  transpose(p, pattern, launcher, workspace);
  launch_gradients<BlockSparse>(
      "BlockSparse", p, state, score_parts(p), launcher,
      [&](const GridPass& pass, const device::GridGradientShape& shape, device::BlockSparseParams& params) -> Dim3 {
        params = pattern;
        const int64_t size = pass.rows_are_keys ? p.pattern.block_k : p.pattern.block_q;
        const int64_t heads = pass.rows_are_keys ? 1 : pattern.heads;
        const int64_t blocks = most_blocks(pass.rows_are_keys ? p.keys : p.queries, size);
        const int64_t all_heads = pass.rows_are_keys ? p.num_kv_heads : p.num_heads();
        return {static_cast<uint32_t>(blocks * ceil_div<int64_t>(size * heads, shape.rows)),
                static_cast<uint32_t>(all_heads / heads), 1};
      });
  clear_unowned(p, p.queries, p.dq, {}, p.group, p.head_dim, launcher);
  clear_unowned(p, p.keys, p.dk, {}, 1, p.head_dim, launcher);
  clear_unowned(p, p.keys, p.dv, {}, 1, p.head_dim_v, launcher);
}

}  // namespace kvk::cuda
