// The kernels of tests/test_cuda_ops_block_sparse.py and tests/test_cuda_ops_neighborhood.py.
#include "emulator/grid_kernels.h"
#include "kvk/device/block_sparse_transpose.cuh"
#include "kvk/device/check_values.cuh"
#include "kvk/device/grid.cuh"
#include "kvk/device/grid_gradient.cuh"
#include "kvk/device/paged_prefill.cuh"

// Tiles of 128 rows, and of 64; part 4 of the score: entry_bias.
KVK_GRID(bf16, 64, 64, BlockSparse, 0);
KVK_GRID(bf16, 64, 64, BlockSparse, 0, true);
KVK_GRID(f16, 32, 40, BlockSparse, 4);
KVK_GRID(f16, 32, 40, BlockSparse, 4, true);
KVK_GRID(f16, 32, 40, BlockSparse, 0, true);
KVK_GRID(bf16, 64, 64, Neighborhood, 0);
KVK_GRID(f16, 32, 40, Neighborhood, 0);
KVK_EMULATED_KERNEL(kvk::device::check_pattern_kernel<512>);

// dq; dk and dv.
KVK_GRADIENT(bf16, 64, 64, BlockSparse, false, 1, 0);
KVK_GRADIENT(bf16, 64, 64, BlockSparse, true, 3, 0);
KVK_GRADIENT(f16, 32, 40, BlockSparse, false, 1, 4);
KVK_GRADIENT(f16, 32, 40, BlockSparse, true, 3, 4);
KVK_GRADIENT(bf16, 64, 64, Neighborhood, false, 1, 0);
KVK_GRADIENT(bf16, 64, 64, Neighborhood, true, 3, 0);
KVK_GRADIENT(f16, 32, 40, Neighborhood, false, 1, 0);
KVK_GRADIENT(f16, 32, 40, Neighborhood, true, 3, 0);
KVK_EMULATED_KERNEL(kvk::device::grid_state_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::grid_state_kernel<kvk::device::f16>);
KVK_EMULATED_KERNEL(kvk::device::block_transpose_kernel<512>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 32>);
