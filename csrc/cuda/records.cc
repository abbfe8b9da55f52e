#include "cuda/records.h"

#include <cmath>

namespace kvk::cuda {

void set_rows(device::RecordMatrices& matrices, int64_t tokens, int64_t dim) {
  matrices.tokens = tokens;
  matrices.dim = dim;
  matrices.rotate_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
}

void set_records(device::RecordMatrices& matrices, const Tensor& dense, const Tensor* dense_ids, const Tensor& pool,
                 const Tensor& ids, int64_t page_size, int64_t dim) {
  matrices.x = dense.data;
  matrices.x_matrices = {2, {ids.shape[0], dense.shape[2]}, {dense.stride[0], dense.stride[2]}};
  matrices.token_stride = dense.stride[1];
  if (dense_ids != nullptr) {
    matrices.x_pages = {dense_ids->ptr<const int32_t>(), dense_ids->stride[0], dense.shape[0]};
  }
  matrices.packed_pages = {ids.ptr<const int32_t>(), ids.stride[0], pool.shape[0]};
  matrices.num_heads = dense.shape[2];
  matrices.num_matrices = ids.shape[0] * matrices.num_heads;
  matrices.vectors = rows_on_16_bytes(dense);
  set_rows(matrices, page_size, dim);
}

}  // namespace kvk::cuda
