// Checks of block-sparse attention and its gradient, and their way to a backend.
#include "kvk/block_sparse.h"

#include <algorithm>
#include <limits>

#include "core/backend.h"
#include "core/block_sparse_problem.h"
#include "core/describe.h"
#include "core/grid_check.h"
#include "core/value_errors.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {
namespace {

constexpr Dim kQueryTokens[] = {{"T"}}, kKeyTokens[] = {{"S"}};

Sequences check_sequences(const ArgChecker& check, const std::optional<Tensor>& starts, const char* name, int64_t total,
                          const char* of) {
  if (!starts) return {nullptr, 0, 1, total};
  check.tensor(*starts, name, DType::i32, {{"B + 1"}});
  if (starts->shape[0] < 1) fail(check.op(), name, " must have shape [B + 1], got [0]");
  check.starts(*starts, name, total, of);
  return {starts->ptr<const int32_t>(), starts->stride[0], starts->shape[0] - 1, total};
}

// cu_seqlens_q and cu_seqlens_k, or neither.
template <class Args, class Problem>
void check_both_sequences(const ArgChecker& check, const Args& args, Problem& problem) {
  if (args.cu_seqlens_q.has_value() != args.cu_seqlens_k.has_value()) {
    fail(check.op(), "cu_seqlens_q and cu_seqlens_k go together, got only ",
         args.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
  }
  problem.queries = check_sequences(check, args.cu_seqlens_q, "cu_seqlens_q", args.q.shape[0], "tokens of q");
  problem.keys = check_sequences(check, args.cu_seqlens_k, "cu_seqlens_k", args.k.shape[0], "tokens of k");
  if (problem.queries.count != problem.keys.count) {
    fail(check.op(), "cu_seqlens_k must have as many entries as cu_seqlens_q, ", problem.queries.count + 1, ", got ",
         problem.keys.count + 1);
  }
}

// The first two dimensions of t[B or 1, Hq or 1, N].
void check_shared(const ArgChecker& check, const Tensor& t, const char* name, const char* shape, int64_t B,
                  int64_t Hq) {
  const auto shared = [&](int64_t size, int64_t full, const char* what) {
    if (size != 1 && size != full) {
      fail(check.op(), name, " must have shape ", shape, " with ", what, "=", full, ", got ", shape_string(t));
    }
  };
  shared(t.shape[0], B, "B");
  shared(t.shape[1], Hq, "Hq");
}

int64_t blocks(int64_t len, int64_t block) { return (len + block - 1) / block; }

int64_t most_blocks(const Sequences& sequences, int64_t block) {
  int64_t most = 0;
  for (int64_t b = 0; b < sequences.count; ++b) most = std::max(most, blocks(sequences.len(b), block));
  return most;
}

// Every row of the pattern that a sequence uses: where it starts, and the blocks that it names.
void check_entries(const ArgChecker& check, const BlockSparseProblem& p) {
  const int64_t Mb = p.pattern.row_ptr.shape[2] - 1, nnz = p.pattern.col_idx.shape[2];
  const int64_t rows = most_blocks(p.queries, p.pattern.block_q), columns = most_blocks(p.keys, p.pattern.block_k);
  if (rows > Mb) fail_block_rows(check.op(), Mb, rows, p.pattern.block_q);
  for (int64_t b = 0; b < p.pattern_batches(); ++b) {
    for (int64_t h = 0; h < p.pattern_heads(); ++h) {
      int64_t previous = 0;
      for (int64_t m = 0; m <= Mb; ++m) {
        const int64_t start = *p.row_ptr(b, h, m);
        if (start < previous) fail_row_start(check.op(), start, previous, m, b, h);
        previous = start;
      }
      if (previous > nnz) fail_row_end(check.op(), nnz, previous, b, h);
      for (int64_t e = *p.row_ptr(b, h, 0); e < previous; ++e) {
        const int64_t col = p.col(b, h, e);
        if (col < 0 || col >= columns) fail_key_block(check.op(), e, col, columns, b, h);
      }
    }
  }
}

BlockSparseProblem check_attention(const ArgChecker& check, const BlockSparseAttentionArgs& args,
                                   const GridGradients* gradients) {
  const GridArgs tensors = {args.q, args.k, args.v, args.out, args.lse, args.softmax_scale};
  BlockSparseProblem problem;
  static_cast<GridProblem&>(problem) = check_grid(check, tensors, kQueryTokens, kKeyTokens, gradients == nullptr);
  if (gradients != nullptr) check_grid_gradients(check, tensors, *gradients, problem);
  check_both_sequences(check, args, problem);
  const BlockPattern& pattern = args.pattern;
  for (const auto& [size, name] : {std::pair(pattern.block_q, "block_q"), {pattern.block_k, "block_k"}}) {
    if (size < 16 || size > 128) fail(check.op(), name, " must be from 16 to 128, got ", size);
  }
  const int64_t B = problem.queries.count, Hq = problem.num_heads();
  check.tensor(pattern.row_ptr, "row_ptr", DType::i32, {{"B or 1"}, {"Hq or 1"}, {"Mb + 1"}});
  check_shared(check, pattern.row_ptr, "row_ptr", "[B or 1, Hq or 1, Mb + 1]", B, Hq);
  if (pattern.row_ptr.shape[2] < 1) {
    fail(check.op(), "row_ptr must have shape [B or 1, Hq or 1, Mb + 1], got ", shape_string(pattern.row_ptr));
  }
  check.tensor(pattern.col_idx, "col_idx", DType::i32,
               {{"B or 1", pattern.row_ptr.shape[0]}, {"Hq or 1", pattern.row_ptr.shape[1]}, {"NNZ"}});
  if (pattern.entry_bias) {
    const Tensor& col = pattern.col_idx;
    check.tensor(*pattern.entry_bias, "entry_bias", DType::f32,
                 {{"B or 1", col.shape[0]}, {"Hq or 1", col.shape[1]}, {"NNZ", col.shape[2]}});
  }
  problem.pattern = pattern;
  problem.causal = args.causal;
  if (check.device().type == DeviceType::cpu) check_entries(check, problem);
  return problem;
}

}  // namespace

void block_sparse_attention(const BlockSparseAttentionArgs& args, const Context& context) {
  const record::Scope recorded("block_sparse_attention", context, [&] { return record::fields_of(args); });
  const ArgChecker check("block_sparse_attention", args.q.device);
  const BlockSparseProblem problem = check_attention(check, args, nullptr);
  by_device(
      check.op(), args.q, "q", [&] { cpu::block_sparse_attention(problem, threads_of(context)); },
      [&] { cuda::block_sparse_attention(problem, args.q.device, context); });
}

void block_sparse_attention_backward(const BlockSparseAttentionBackwardArgs& args, const Context& context) {
  const record::Scope recorded("block_sparse_attention_backward", context, [&] { return record::fields_of(args); });
  const ArgChecker check("block_sparse_attention_backward", args.forward.q.device);
  const GridGradients gradients = {args.grad_out, args.grad_lse, args.dq, args.dk, args.dv};
  const BlockSparseProblem problem = check_attention(check, args.forward, &gradients);
  by_device(
      check.op(), args.forward.q, "q", [&] { cpu::block_sparse_attention_backward(problem, threads_of(context)); },
      [&] { cuda::block_sparse_attention_backward(problem, args.forward.q.device, context); });
}

void vertical_slash_attention(const VerticalSlashAttentionArgs& args, const Context& context) {
  const record::Scope recorded("vertical_slash_attention", context, [&] { return record::fields_of(args); });
  const ArgChecker check("vertical_slash_attention", args.q.device);
  VerticalSlashProblem problem;
  static_cast<GridProblem&>(problem) = check_grid(
      check, {args.q, args.k, args.v, args.out, args.lse, args.softmax_scale}, kQueryTokens, kKeyTokens, true);
  check_both_sequences(check, args, problem);
  const int64_t B = problem.queries.count, Hq = args.q.shape[1];
  check.tensor(args.vertical, "vertical", DType::i32, {{"B or 1"}, {"Hq or 1"}, {"NV"}});
  check_shared(check, args.vertical, "vertical", "[B or 1, Hq or 1, NV]", B, Hq);
  check.tensor(args.slash, "slash", DType::i32,
               {{"B or 1", args.vertical.shape[0]}, {"Hq or 1", args.vertical.shape[1]}, {"NS"}});
  problem.vertical = args.vertical;
  problem.slash = args.slash;
  by_device(
      check.op(), args.q, "q", [&] { cpu::vertical_slash_attention(problem, threads_of(context)); },
      [&] { fail(check.op(), "q must be on cpu, got ", device_name(args.q.device)); });
}

}  // namespace kvk
