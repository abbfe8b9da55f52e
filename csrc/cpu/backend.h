// The CPU backend: checked problems in, results out.
#pragma once

#include "core/block_sparse_problem.h"
#include "core/neighborhood_problem.h"
#include "core/paged_problem.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"
#include "kvk/threads.h"

namespace kvk::cpu {

void paged_attention(const PagedProblem& problem, Threads& threads);
void append_kv(const AppendKvArgs& args, Threads& threads);
void merge_states(const MergeStatesArgs& args, Threads& threads);
void merge_states_backward(const MergeStatesBackwardArgs& args, Threads& threads);
void block_sparse_attention(const BlockSparseProblem& problem, Threads& threads);
void block_sparse_attention_backward(const BlockSparseProblem& problem, Threads& threads);
void neighborhood_attention(const NeighborhoodProblem& problem, Threads& threads);
void neighborhood_attention_backward(const NeighborhoodProblem& problem, Threads& threads);
void vertical_slash_attention(const VerticalSlashProblem& problem, Threads& threads);
void hadamard(const HadamardArgs& args, Threads& threads);
void lightning_attention(const LightningArgs& args, Threads& threads);
void lightning_attention_backward(const LightningBackwardArgs& args, Threads& threads);
void lightning_decode(const LightningDecodeArgs& args, Threads& threads);
void linear_attention(const LinearAttentionArgs& args, Threads& threads);
void linear_attention_backward(const LinearAttentionBackwardArgs& args, Threads& threads);
void taylor_feature_map(const TaylorFeatureMapArgs& args, Threads& threads);
void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, Threads& threads);
void quantize_pages(const QuantizePagesArgs& args, Threads& threads);
void dequantize_pages(const DequantizePagesArgs& args, Threads& threads);
void quantize(const QuantizeArgs& args, Threads& threads);
void dequantize(const DequantizeArgs& args, Threads& threads);
void compress_pages(const CompressPagesArgs& args, Threads& threads);
void decompress_pages(const DecompressPagesArgs& args, Threads& threads);

}  // namespace kvk::cpu
