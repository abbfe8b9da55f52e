// The CUDA backend: checked calls in, kernels queued on the context's stream.
#pragma once

#include <cstddef>

#include "core/block_sparse_problem.h"
#include "core/neighborhood_problem.h"
#include "core/paged_problem.h"
#include "kvk/context.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"

namespace kvk::cuda {

// list_entries: most pages that one list of the page table can name.
void paged_attention(const char* op, const PagedProblem& problem, int64_t list_entries, Device device,
                     const Context& context);
void append_kv(const AppendKvArgs& args, const Context& context);
void merge_states(const MergeStatesArgs& args, const Context& context);
void merge_states_backward(const MergeStatesBackwardArgs& args, const Context& context);
void hadamard(const HadamardArgs& args, const Context& context);
void quantize_pages(const QuantizePagesArgs& args, const Context& context);
void dequantize_pages(const DequantizePagesArgs& args, const Context& context);
void quantize(const QuantizeArgs& args, const Context& context);
void dequantize(const DequantizeArgs& args, const Context& context);
void compress_pages(const CompressPagesArgs& args, const Context& context);
void decompress_pages(const DecompressPagesArgs& args, const Context& context);
void lightning_attention(const LightningArgs& args, const Context& context);
void lightning_attention_backward(const LightningBackwardArgs& args, const Context& context);
void linear_attention(const LinearAttentionArgs& args, const Context& context);
void linear_attention_backward(const LinearAttentionBackwardArgs& args, const Context& context);
void lightning_decode(const LightningDecodeArgs& args, const Context& context);
void block_sparse_attention(const BlockSparseProblem& problem, Device device, const Context& context);
void neighborhood_attention(const NeighborhoodProblem& problem, Device device, const Context& context);
void block_sparse_attention_backward(const BlockSparseProblem& problem, Device device, const Context& context);
void neighborhood_attention_backward(const NeighborhoodProblem& problem, Device device, const Context& context);

// Waits for the stream and copies from the card: what recording does (csrc/core/dump.h).
void read_memory(Device device, void* stream, void* host, const void* from, size_t bytes);

}  // namespace kvk::cuda
