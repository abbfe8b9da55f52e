// Launch code of block-sparse attention. The host knows no lengths and no lists: the kernels find their work on the card.
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

// Queries of no sequence.
void clear_unowned_queries(const BlockSparseProblem& p, Launcher& launcher) {
  if (p.queries.starts == nullptr) return;
  constexpr int kTokens = device::kGridDims - 1;
  device::PagedPrefillParams params = {};
  params.problem.num_requests = static_cast<int32_t>(p.queries.count);
  params.problem.qo_indptr = p.queries.starts;
  params.problem.qo_indptr_stride = p.queries.stride;
  params.problem.num_tokens = p.queries.total;
  params.problem.num_kv_heads = p.num_kv_heads;
  params.problem.group = p.group;
  params.problem.head_dim_v = p.head_dim_v;
  params.problem.out = {p.out.data, p.out.stride[kTokens], p.out.head_stride};
  params.problem.lse = static_cast<float*>(p.lse.data);
  params.problem.lse_token_stride = p.lse.stride[kTokens];
  params.problem.lse_head_stride = p.lse.head_stride;
  launch_clear_unowned(params, p.dtype, launcher);
}

}  // namespace

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
  clear_unowned_queries(p, launcher);
}

std::vector<Kernel> default_grid_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const bool small : {false, true}) kernels.push_back(grid_kernel("BlockSparse", dtype, 128, 128, 0, small));
    for (const int dim : {64, 128}) kernels.push_back(grid_kernel("Neighborhood", dtype, dim, dim, 0, false));
  }
  return kernels;
}

}  // namespace kvk::cuda
