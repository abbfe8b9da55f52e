// What launch code of quantized and of bitmap-sparse records shares.
#pragma once

#include "cuda/launch.h"
#include "kvk/device/record_params.h"

namespace kvk::cuda {

// Sizes of a matrix.
void set_rows(device::RecordMatrices& matrices, int64_t tokens, int64_t dim);

// K or V of `ids.shape[0]` pages: dense ones [., P, Hkv, D], in the order of `dense_ids` or one after another, and their records.
void set_records(device::RecordMatrices& matrices, const Tensor& dense, const Tensor* dense_ids, const Tensor& pool,
                 const Tensor& ids, int64_t page_size, int64_t dim);

// Queues a kernel of four warps a block over `warps` of each matrix.
template <class Params>
void launch_warps(Launcher& launcher, const Kernel& kernel, int64_t warps, const Params& params) {
  launch(launcher, kernel, {grid_size(device::ceil_div<int64_t>(params.num_matrices * warps, 4)), 1, 1}, 128, 0,
         params);
}

}  // namespace kvk::cuda
