// Block-sparse and neighborhood attention on CUDA, the gradients.
#include "emulator/grid_case.h"
#include "emulator/grid_kernels.h"
#include "kvk/device/block_sparse_transpose.cuh"
#include "kvk/device/grid_gradient.cuh"
#include "kvk/device/paged_prefill.cuh"

KVK_GRADIENT(bf16, 32, 40, BlockSparse, false, 1, 4);
KVK_GRADIENT(bf16, 32, 40, BlockSparse, true, 3, 4);
// dk and dv apart, tiles of 32 rows and 16 columns.
KVK_GRADIENT(f16, 256, 256, Neighborhood, false, 1, 0, true);
KVK_GRADIENT(f16, 256, 256, Neighborhood, true, 1, 0, true);
KVK_GRADIENT(f16, 256, 256, Neighborhood, true, 2, 0, true);
KVK_EMULATED_KERNEL(kvk::device::grid_state_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::grid_state_kernel<kvk::device::f16>);
KVK_EMULATED_KERNEL(kvk::device::block_transpose_kernel<512>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 32>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 40>);

int main() {
  using namespace kvk;
  return emu::run_tests([] {
    test_blocks(true, 16, 80, 3);  // several tiles of rows for a key block, and several of columns for a query head
    test_blocks(true, 48, 16, 3);
    test_neighborhood(true, 3, 20, {3, 2, 1, true}, {7, 3, 2, false}, 2, 256, 99 * 1024);
  });
}
