// KVK_CHECK=1: page ids, lengths, starts and slots, which lie on the card, are checked there before the op's kernels run.
// Each call waits for the card, and throws kvk::Error for the first bad value, worded as on the CPU.
#pragma once

#include "cuda/launch.h"

namespace kvk::cuda {

void check_table_values(const char* op, const PagedProblem& problem, int64_t list_entries, Launcher& launcher,
                        Workspace& workspace);
void check_slot_values(const AppendKvArgs& args, Launcher& launcher, Workspace& workspace);
void check_quantize_ids(const QuantizePagesArgs& args, Launcher& launcher, Workspace& workspace);
void check_dequantize_ids(const DequantizePagesArgs& args, Launcher& launcher, Workspace& workspace);
// Page ids, and masks and bitmaps that select more than a row may keep.
void check_compress_values(const CompressPagesArgs& args, Launcher& launcher, Workspace& workspace);
void check_decompress_ids(const DecompressPagesArgs& args, Launcher& launcher, Workspace& workspace);
// The starts of packed sequences, if there are any.
void check_lightning_starts(const LightningArgs& args, Launcher& launcher, Workspace& workspace);
void check_lightning_backward_starts(const LightningBackwardArgs& args, Launcher& launcher, Workspace& workspace);
// Starts of the sequences, and the pattern's rows and blocks.
void check_block_pattern(const BlockSparseProblem& p, Launcher& launcher, Workspace& workspace);
void check_linear_starts(const LinearAttentionArgs& args, Launcher& launcher, Workspace& workspace);
void check_linear_backward_starts(const LinearAttentionBackwardArgs& args, Launcher& launcher, Workspace& workspace);
void check_state_slots(const LightningDecodeArgs& args, Launcher& launcher, Workspace& workspace);

// The kernels of all.
std::vector<Kernel> check_kernels();

}  // namespace kvk::cuda
