// Launch code of quantize_pages, dequantize_pages, quantize and dequantize: one kernel each, over the matrices of K, of V, or
// of a tensor.
#include "core/check.h"
#include "cuda/records.h"
#include "kvk/device/quant_params.h"

namespace kvk::cuda {
namespace {

using device::QuantParams;

Kernel quant_kernel(const char* name, DType dtype, const QuantPart& part, int64_t dim) {
  const int64_t rotated = part.rotate ? dim : 0;
  return {"kvk/device/quant.cuh", std::string("kvk::device::") + name + "<kvk::device::QuantCoding<" +
                                      kernel_type(dtype) + ", " + std::to_string(part.bits) + ", " +
                                      (part.along_tokens ? "true" : "false") + ", " + std::to_string(rotated) + ">>"};
}

void launch_quantize(const QuantParams& params, DType dtype, const QuantPart& part, Launcher& launcher) {
  launch_warps(launcher, quant_kernel("quantize_kernel", dtype, part, params.dim),
               device::quantize_warps(params.tokens, params.dim, part), params);
}

void launch_dequantize(const QuantParams& params, DType dtype, const QuantPart& part, Launcher& launcher) {
  launch_warps(launcher, quant_kernel("dequantize_kernel", dtype, part, params.dim),
               device::dequantize_warps(params.tokens, params.dim), params);
}

// K or V of some pages: dense ones and records.
QuantParams record_params(const Tensor& dense, const Tensor* dense_ids, const Tensor& pool, const Tensor& ids,
                          int64_t page_size, int64_t dim, const QuantPart& part, double clip) {
  const QuantLayout layout = device::quant_layout(page_size, dim, part);
  QuantParams params = {};
  set_records(params, dense, dense_ids, pool, ids, page_size, dim);
  uint8_t* records = pool.ptr<uint8_t>();
  params.codes = {records, pool.stride[0], pool.stride[1]};
  params.scale = {records + layout.scale_offset, pool.stride[0], pool.stride[1]};
  params.min = {records + layout.min_offset, pool.stride[0], pool.stride[1]};
  params.group = part.group;
  params.clip = static_cast<float>(clip);
  const int64_t ends[3] = {page_size * layout.row_bytes, layout.scale_offset + layout.num_scales * 2,
                           layout.min_offset + layout.num_scales * 2};
  const int64_t next[3] = {layout.scale_offset, layout.min_offset, layout.record_bytes};
  for (int i = 0; i < 3; ++i) {
    params.padding[i][0] = ends[i];
    params.padding[i][1] = next[i];
  }
  return params;
}

// A tensor [.., T, n] and its codes, one matrix after another.
QuantParams tensor_params(const Tensor& x, const QuantPart& part, const Tensor& codes, const Tensor& scale,
                          const Tensor& min, double clip) {
  const int64_t n = x.shape[x.ndim - 1], tokens = x.ndim > 1 ? x.shape[x.ndim - 2] : 1;
  QuantParams params = {};
  params.x = x.data;
  params.x_matrices = row_grid(x, 2);
  params.token_stride = x.ndim > 1 ? x.stride[x.ndim - 2] : 0;
  const int64_t scale_bytes = tokens * n / part.group * 2;
  params.codes = {codes.data, tokens * n * part.bits / 8, 0};
  params.scale = {scale.data, scale_bytes, 0};
  params.min = {min.data, scale_bytes, 0};
  params.num_heads = 1;
  params.num_matrices = tokens * n > 0 ? x.numel() / (tokens * n) : 0;
  params.group = part.group;
  params.clip = static_cast<float>(clip);
  set_rows(params, tokens, n);
  params.vectors = rows_on_16_bytes(x);
  return params;
}

// What lanes read and write at once: 8 codes, 8 scales of neighbouring channels, or one scale.
void check_alignment(const char* op, const Tensor& codes, const Tensor& scale, const Tensor& min,
                     const QuantPart& part) {
  const auto check = [op](const Tensor& t, const char* name, int64_t bytes) {
    if (t.numel() > 0 && reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes) != 0) {
      fail(op, name, " must start on a multiple of ", bytes, " bytes on a card");
    }
  };
  check(codes, "codes", part.bits == 3 ? 1 : part.bits);
  check(scale, "scale", part.along_tokens ? 16 : 2);
  check(min, "min", part.along_tokens ? 16 : 2);
}

}  // namespace

void launch_quantize_pages(const QuantizePagesArgs& args, Launcher& launcher) {
  const QuantFormat& f = args.format;
  const DType dtype = args.k_pages.dtype;
  launch_quantize(
      record_params(args.k_pages, &args.src, args.k_pool, args.dst, f.page_size, f.head_dim, f.k, args.k_clip), dtype,
      f.k, launcher);
  launch_quantize(
      record_params(args.v_pages, &args.src, args.v_pool, args.dst, f.page_size, f.head_dim_v, f.v, args.v_clip), dtype,
      f.v, launcher);
}

void launch_dequantize_pages(const DequantizePagesArgs& args, Launcher& launcher) {
  const QuantFormat& f = args.format;
  launch_dequantize(record_params(args.k, nullptr, args.k_pool, args.ids, f.page_size, f.head_dim, f.k, 1.0),
                    args.k.dtype, f.k, launcher);
  launch_dequantize(record_params(args.v, nullptr, args.v_pool, args.ids, f.page_size, f.head_dim_v, f.v, 1.0),
                    args.k.dtype, f.v, launcher);
}

void launch_quantize(const QuantizeArgs& args, Launcher& launcher) {
  check_alignment("quantize", args.codes, args.scale, args.min, args.part);
  launch_quantize(tensor_params(args.x, args.part, args.codes, args.scale, args.min, args.clip), args.x.dtype,
                  args.part, launcher);
}

void launch_dequantize(const DequantizeArgs& args, Launcher& launcher) {
  check_alignment("dequantize", args.codes, args.scale, args.min, args.part);
  launch_dequantize(tensor_params(args.x, args.part, args.codes, args.scale, args.min, 1.0), args.x.dtype, args.part,
                    launcher);
}

std::vector<Kernel> default_quant_kernels() {
  std::vector<Kernel> kernels;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const bool along_tokens : {true, false}) {
      for (const int bits : {2, 4}) {
        kernels.push_back(quant_kernel("quantize_kernel", dtype, {bits, 32, along_tokens, 0}, 128));
      }
      kernels.push_back(quant_kernel("dequantize_kernel", dtype, {4, 32, along_tokens, 0}, 128));
    }
    kernels.push_back(quant_kernel("quantize_kernel", dtype, {4, 32, false, 1}, 128));  // per-token keys, rotated
    for (const int n : {128, 4096}) kernels.push_back(hadamard_kernel(dtype, n, false));
  }
  return kernels;
}

}  // namespace kvk::cuda
