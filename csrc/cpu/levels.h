// The kernels, once per instruction-set level, and the choice of a level at load time.
//
// Every source named in KVK_LEVEL_SOURCES (CMakeLists.txt) is compiled once per level with KVK_LEVEL set to that level's
// namespace. All objects of a level are then linked into one whose only global symbol is its table below, so that no
// inline function compiled for a newer machine can replace its twin of an older level.
#pragma once

#include "core/paged_problem.h"
#include "cpu/grid.h"
#include "cpu/lightning_plan.h"
#include "cpu/plan.h"
#include "cpu/quant_block.h"
#include "cpu/sparse_block.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/paged.h"

namespace kvk::cpu {

// Results of single splits, merged when all splits of a tile are there: unnormalised output, running maximum and sum.
struct Partials {
  float* out;  // [rows, out_stride]
  float* max;  // [rows]
  float* sum;  // [rows]
  int64_t out_stride;
};

struct Kernels {
  const char* name;
  int64_t (*attention_scratch_bytes)(const PagedProblem& problem, const Plan& plan);
  void (*attend)(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials);
  void (*merge_splits)(const PagedProblem& problem, const Tile& tile, const Partials& partials);
  int64_t (*grid_scratch_bytes)(GridPass pass, const GridProblem& problem, int max_rows);
  void (*grid_tile)(GridPass pass, const GridProblem& problem, GridSchedule& schedule, int64_t tile, void* scratch);
  // Rows are (token, head) pairs, token-major.
  void (*merge_states)(const MergeStatesArgs& args, int64_t row_begin, int64_t row_end);
  void (*merge_states_backward)(const MergeStatesBackwardArgs& args, int64_t row_begin, int64_t row_end);
  // Rows are all but the last dimension, in order; scale is given.
  void (*hadamard)(const HadamardArgs& args, int64_t row_begin, int64_t row_end);
  // scratch: this many floats, zeros before its first use.
  int64_t (*lightning_scratch_floats)(int dk, int dv);
  void (*lightning_forward)(const LightningArgs& args, const LightningItem& item, float* scratch);
  // Rows are (row of the batch, head) pairs.
  void (*lightning_decode)(const LightningDecodeArgs& args, int64_t begin, int64_t end);
  int64_t (*lightning_backward_scratch_floats)(int dk, int dv);
  // decay_sum: where the gradient of a decay per head is added up; null where decays are per token.
  void (*lightning_backward)(const LightningBackwardArgs& args, const LightningItem& item, float* scratch,
                             double* decay_sum);
  // scratch as above.
  int64_t (*linear_scratch_floats)(int dk, int dv);
  void (*linear_forward)(const LinearAttentionArgs& args, const LightningItem& item, float* scratch);
  void (*linear_backward)(const LinearAttentionBackwardArgs& args, const LightningItem& item, float* scratch);
  // Rows as hadamard's.
  void (*taylor_feature_map)(const TaylorFeatureMapArgs& args, int64_t row_begin, int64_t row_end);
  void (*taylor_feature_map_backward)(const TaylorFeatureMapBackwardArgs& args, int64_t row_begin, int64_t row_end);
  void (*quantize_block)(const QuantBlock& block);
  void (*dequantize_block)(const QuantBlock& block);
  void (*compress_block)(const SparseBlock& block);
  void (*decompress_block)(const SparseBlock& block);
  void (*join_rows)(const JointBlock& block);
  void (*split_rows)(const JointBlock& block);
};

// The level in use; chosen once.
const Kernels& kernels();

}  // namespace kvk::cpu

// One per level that this build holds.
extern "C" const kvk::cpu::Kernels kvk_cpu_kernels_base;
extern "C" const kvk::cpu::Kernels kvk_cpu_kernels_x86_64_v3;
extern "C" const kvk::cpu::Kernels kvk_cpu_kernels_x86_64_v4;
