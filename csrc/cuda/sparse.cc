// Launch code of compress_pages and decompress_pages: a kernel for K and one for V.
#include "kvk/sparse.h"
#include "cuda/records.h"
#include "kvk/device/sparse_params.h"

namespace kvk::cuda {
namespace {

using device::SparseParams;

constexpr const char* kHeader = "kvk/device/sparse.cuh";

const char* select_name(const std::optional<Tensor>& select) {
  if (!select) return "magnitude";
  return select->dtype == DType::f32 ? "scores" : select->dtype == DType::boolean ? "mask" : "bitmap";
}

std::string dim_and_rotation(int64_t dim, const BitmapPart& part) {
  return std::to_string(dim) + (part.rotate != 0 ? ", true" : ", false");
}

Kernel compress_kernel(DType in, DType value, int64_t dim, const BitmapPart& part, const char* select) {
  return {kHeader, "kvk::device::compress_kernel<kvk::device::SparseCoding<" + kernel_type(in) + ", " +
                       kernel_type(value) + ", " + dim_and_rotation(dim, part) + ", kvk::device::Select::" + select +
                       ">>"};
}

Kernel decompress_kernel(DType value, int64_t dim, const BitmapPart& part) {
  return {kHeader, "kvk::device::decompress_kernel<" + kernel_type(value) + ", " + dim_and_rotation(dim, part) + ">"};
}

SparseParams record_params(const Tensor& dense, const Tensor* dense_ids, const Tensor& pool, const Tensor& ids,
                           int64_t page_size, int64_t dim, const BitmapPart& part) {
  const BitmapLayout layout = device::bitmap_layout(page_size, dim, part);
  SparseParams params = {};
  set_records(params, dense, dense_ids, pool, ids, page_size, dim);
  params.records = {pool.data, pool.stride[0], pool.stride[1]};
  params.keep = part.keep;
  params.bitmap_offset = layout.bitmap_offset;
  params.record_bytes = layout.record_bytes;
  return params;
}

void compress(const CompressPagesArgs& args, bool is_v, Launcher& launcher) {
  const BitmapFormat& f = args.format;
  const Tensor& pages = is_v ? args.v_pages : args.k_pages;
  const int64_t dim = is_v ? f.head_dim_v : f.head_dim;
  const BitmapPart& part = is_v ? f.v : f.k;
  const std::optional<Tensor>& select = is_v ? args.v_select : args.k_select;
  SparseParams params =
      record_params(pages, &args.src, is_v ? args.v_pool : args.k_pool, args.dst, f.page_size, dim, part);
  if (select) {
    params.select = select->data;
    params.select_page_stride = select->stride[0];
    params.select_token_stride = select->stride[1];
    params.select_head_stride = select->stride[2];
    params.select_vectors = rows_on_16_bytes(*select);
  }
  launch_warps(launcher, compress_kernel(pages.dtype, f.dtype, dim, part, select_name(select)),
               device::sparse_warps(f.page_size, dim), params);
}

void decompress(const DecompressPagesArgs& args, bool is_v, Launcher& launcher) {
  const BitmapFormat& f = args.format;
  const int64_t dim = is_v ? f.head_dim_v : f.head_dim;
  const BitmapPart& part = is_v ? f.v : f.k;
  launch_warps(launcher, decompress_kernel(f.dtype, dim, part), device::sparse_warps(f.page_size, dim),
               record_params(is_v ? args.v : args.k, nullptr, is_v ? args.v_pool : args.k_pool, args.ids, f.page_size,
                             dim, part));
}

}  // namespace

void launch_compress_pages(const CompressPagesArgs& args, Launcher& launcher) {
  for (const bool is_v : {false, true}) compress(args, is_v, launcher);
}

void launch_decompress_pages(const DecompressPagesArgs& args, Launcher& launcher) {
  for (const bool is_v : {false, true}) decompress(args, is_v, launcher);
}

std::vector<Kernel> default_sparse_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    kernels.push_back(compress_kernel(dtype, dtype, 128, {}, "magnitude"));
    kernels.push_back(compress_kernel(dtype, dtype, 128, {}, "scores"));
    kernels.push_back(compress_kernel(dtype, dtype, 128, {0, 1}, "magnitude"));
    kernels.push_back(decompress_kernel(dtype, 128, {}));
  }
  return kernels;
}

}  // namespace kvk::cuda
