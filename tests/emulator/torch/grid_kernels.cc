// The kernels of tests/test_cuda_ops_block_sparse.py and tests/test_cuda_ops_neighborhood.py.
#include "kvk/device/check_values.cuh"
#include "kvk/device/grid.cuh"

#define KVK_GRID(T, D, DV, SCHEDULE, ...)                 \
  KVK_EMULATED_KERNEL(kvk::device::grid_attention_kernel< \
                      kvk::device::GridConfig<kvk::device::T, D, DV, kvk::device::SCHEDULE, __VA_ARGS__>>)

// Tiles of 128 rows, and of 64; part 4 of the score: entry_bias.
KVK_GRID(bf16, 64, 64, BlockSparse, 0);
KVK_GRID(bf16, 64, 64, BlockSparse, 0, true);
KVK_GRID(f16, 32, 40, BlockSparse, 4);
KVK_GRID(f16, 32, 40, BlockSparse, 4, true);
KVK_GRID(f16, 32, 40, BlockSparse, 0, true);
KVK_GRID(bf16, 64, 64, Neighborhood, 0);
KVK_GRID(f16, 32, 40, Neighborhood, 0);
KVK_EMULATED_KERNEL(kvk::device::check_pattern_kernel<512>);
