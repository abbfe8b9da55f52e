// Launch code of every op: which kernel instantiation, which grid, how much memory. It knows a launcher, not a driver, so
// that tests run it over the device emulator.
#pragma once

#include <string>
#include <vector>

#include "core/block_sparse_problem.h"
#include "core/neighborhood_problem.h"
#include "core/paged_problem.h"
#include "cuda/launcher.h"
#include "kvk/device/hadamard_params.h"
#include "kvk/device/paged_prefill_params.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"

namespace kvk::cuda {

// Memory on the device that stays valid until the work queued by this call is done.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* allocate(int64_t bytes) = 0;
};

void launch_paged_attention(const PagedProblem& problem, int64_t list_entries, Launcher& launcher,
                            Workspace& workspace);
void launch_append_kv(const AppendKvArgs& args, Launcher& launcher);
void launch_merge_states(const MergeStatesArgs& args, Launcher& launcher);
void launch_merge_states_backward(const MergeStatesBackwardArgs& args, Launcher& launcher);
void launch_hadamard(const HadamardArgs& args, Launcher& launcher);
void launch_quantize_pages(const QuantizePagesArgs& args, Launcher& launcher);
void launch_dequantize_pages(const DequantizePagesArgs& args, Launcher& launcher);
void launch_quantize(const QuantizeArgs& args, Launcher& launcher);
void launch_dequantize(const DequantizeArgs& args, Launcher& launcher);
void launch_compress_pages(const CompressPagesArgs& args, Launcher& launcher);
void launch_decompress_pages(const DecompressPagesArgs& args, Launcher& launcher);
void launch_lightning_attention(const LightningArgs& args, Launcher& launcher);
void launch_lightning_attention_backward(const LightningBackwardArgs& args, Launcher& launcher, Workspace& workspace);
void launch_linear_attention(const LinearAttentionArgs& args, Launcher& launcher);
void launch_linear_attention_backward(const LinearAttentionBackwardArgs& args, Launcher& launcher,
                                      Workspace& workspace);
void launch_lightning_decode(const LightningDecodeArgs& args, Launcher& launcher);
void launch_block_sparse_attention(const BlockSparseProblem& p, Launcher& launcher);
void launch_neighborhood_attention(const NeighborhoodProblem& p, Launcher& launcher);
void launch_block_sparse_attention_backward(const BlockSparseProblem& p, Launcher& launcher, Workspace& workspace);
void launch_neighborhood_attention_backward(const NeighborhoodProblem& p, Launcher& launcher, Workspace& workspace);

// The kernels that precompile compiles when it is not told which: common head dims, no score options.
std::vector<Kernel> default_kernels();
std::vector<Kernel> default_quant_kernels();
std::vector<Kernel> default_sparse_kernels();
std::vector<Kernel> default_lightning_kernels();
std::vector<Kernel> default_grid_kernels();
std::vector<Kernel> default_linear_kernels();

// "kvk::device::NAME<kvk::device::bf16, ARG, ..>"
std::string kernel_type(DType dtype);

// Whether every row, along the last dimension, starts on a multiple of 16 bytes and is as long.
bool rows_on_16_bytes(const Tensor& t);
// All dimensions of t but the last ones.
device::RowGrid row_grid(const Tensor& t, int trailing);
// Rows that no kernel owns, behind the last of the starts in params.problem: out 0 and lse, unless null, -inf.
void launch_clear_unowned(const device::PagedPrefillParams& params, DType dtype, Launcher& launcher);
Kernel hadamard_kernel(DType dtype, int64_t n, bool transpose);

// Blocks along x, of kernels that loop over what is left.
inline uint32_t grid_size(int64_t blocks) { return static_cast<uint32_t>(blocks < 0x7fffffff ? blocks : 0x7fffffff); }

// Queues a kernel with its struct of parameters; threads along x alone.
template <class Params>
void launch(Launcher& launcher, const Kernel& kernel, Dim3 grid, uint32_t threads, size_t shared_bytes,
            const Params& params) {
  launcher.launch(kernel, grid, {threads, 1, 1}, shared_bytes, &params, sizeof params);
}

}  // namespace kvk::cuda
