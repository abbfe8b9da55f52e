// The kernels of one instruction-set level; table.cc gathers them.
#pragma once

#include "cpu/levels.h"

namespace kvk::cpu::KVK_LEVEL {

int64_t attention_scratch_bytes(const PagedProblem& problem, const Plan& plan);
void attend(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials);
void merge_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials);
int64_t grid_scratch_bytes(GridPass pass, const GridProblem& problem, int max_rows);
void grid_tile(GridPass pass, const GridProblem& problem, GridSchedule& schedule, int64_t tile, void* scratch);
void merge_states(const MergeStatesArgs& args, int64_t row_begin, int64_t row_end);
void merge_states_backward(const MergeStatesBackwardArgs& args, int64_t row_begin, int64_t row_end);
void hadamard(const HadamardArgs& args, int64_t row_begin, int64_t row_end);
int64_t lightning_scratch_floats(int dk, int dv);
void lightning_forward(const LightningArgs& args, const LightningItem& item, float* scratch);
void lightning_decode(const LightningDecodeArgs& args, int64_t begin, int64_t end);
int64_t lightning_backward_scratch_floats(int dk, int dv);
void lightning_backward(const LightningBackwardArgs& args, const LightningItem& item, float* scratch,
                        double* decay_sum);
int64_t linear_scratch_floats(int dk, int dv);
void linear_forward(const LinearAttentionArgs& args, const LightningItem& item, float* scratch);
void linear_backward(const LinearAttentionBackwardArgs& args, const LightningItem& item, float* scratch);
void taylor_feature_map(const TaylorFeatureMapArgs& args, int64_t row_begin, int64_t row_end);
void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, int64_t row_begin, int64_t row_end);
void quantize_block(const QuantBlock& block);
void dequantize_block(const QuantBlock& block);
void compress_block(const SparseBlock& block);
void decompress_block(const SparseBlock& block);
// The engine over records of bitmaps; attend() and merge_splits() call these.
void attend_sparse(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials);
void merge_sparse_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials);
void join_rows(const JointBlock& block);
void split_rows(const JointBlock& block);

}  // namespace kvk::cpu::KVK_LEVEL
