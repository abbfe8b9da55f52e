// Block-sparse and neighborhood attention on CUDA, the forward pass.
#include "emulator/grid_case.h"
#include "emulator/grid_kernels.h"
#include "kvk/device/grid.cuh"
#include "kvk/device/paged_prefill.cuh"

KVK_GRID(bf16, 32, 40, BlockSparse, 4);
KVK_GRID(bf16, 32, 40, BlockSparse, 4, true);
KVK_GRID(f16, 32, 32, Neighborhood, 0);
KVK_GRID(f16, 256, 256, Neighborhood, 0, true);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 40>);

int main() {
  using namespace kvk;
  return emu::run_tests([] {
    const int most = int(emu::max_smem_bytes());
    test_blocks(false, 16, 48, 3);  // 64 rows a tile, of which 48 are there
    test_blocks(false, 48, 16, 3);  // 128 and 16 of them; 64 keys are 4 blocks
    test_neighborhood(false, 7, 33, {5, 2, 1, true}, {9, 3, 2, false}, 3, 32, most);  // several tiles of columns
    test_neighborhood(false, 2, 30, {2, 1, 1, false}, {29, 1, 1, false}, 1, 256, 99 * 1024);  // 16 columns a tile
  });
}
