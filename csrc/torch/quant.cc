// torch.ops.kvk: quantized pages. A format travels as the integers that kvk::quant_format reads (kvk.QuantFormat.numbers).
#include "kvk/quant.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;
using Numbers = std::vector<int64_t>;

void quantize_pages_op(TorchTensor k_pages, TorchTensor v_pages, TorchTensor src, TorchTensor k_pool,
                       TorchTensor v_pool, TorchTensor dst, Numbers fmt, double k_clip, double v_clip,
                       MaybeTensor k_permutation) {
  quantize_pages({view(k_pages), view(v_pages), view(src), view(k_pool), view(v_pool), view(dst),
                  quant_format("quantize_pages", fmt), k_clip, v_clip, view(k_permutation)},
                 TorchContext(k_pages));
}

std::tuple<TorchTensor, TorchTensor> dequantize_pages_op(TorchTensor k_pool, TorchTensor v_pool, TorchTensor ids,
                                                         Numbers fmt, ScalarType dtype, MaybeTensor k_permutation) {
  const QuantFormat format = quant_format("dequantize_pages", fmt);
  if (k_pool.dim() != 3) {
    fail("dequantize_pages", "k_pool must have shape [N, Hkv, record_bytes], got ", shape_string(view(k_pool)));
  }
  if (ids.dim() != 1) fail("dequantize_pages", "ids must have shape [n], got ", shape_string(view(ids)));
  const int64_t n = ids.size(0), heads = k_pool.size(1);
  TorchTensor k = new_tensor(k_pool, {n, format.page_size, heads, format.head_dim}, dtype);
  TorchTensor v = new_tensor(k_pool, {n, format.page_size, heads, format.head_dim_v}, dtype);
  dequantize_pages({view(k_pool), view(v_pool), view(ids), format, view(k), view(v), view(k_permutation)},
                   TorchContext(k_pool));
  return {k, v};
}

QuantPart part_of(const char* op, int64_t bits, int64_t group, int64_t axis) {
  if (axis != -1 && axis != -2) fail(op, "axis must be -1 or -2, got ", axis);
  const auto narrow = [](int64_t x) {  // out of range stays out of range
    return static_cast<int32_t>(std::clamp<int64_t>(x, -1, std::numeric_limits<int32_t>::max()));
  };
  return {narrow(bits), narrow(group), axis == -2, 0};
}

// Shape of x with one dimension multiplied and divided.
std::vector<int64_t> scaled_shape(const Tensor& x, int dim, int64_t times, int64_t by) {
  std::vector<int64_t> shape(x.shape, x.shape + x.ndim);
  shape[static_cast<size_t>(dim)] = shape[static_cast<size_t>(dim)] * times / by;
  return shape;
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> quantize_op(TorchTensor x, int64_t bits, int64_t group, int64_t axis,
                                                              double clip) {
  const QuantPart part = part_of("quantize", bits, group, axis);
  const Tensor v = view(x);
  const int group_dim = v.ndim + static_cast<int>(axis);
  if (v.ndim < 1 || group_dim < 0) {
    fail("quantize", "x must have shape ", axis == -1 ? "[..., n]" : "[..., T, n]", ", got ", shape_string(v));
  }
  if (part.group < 1 || part.bits < 1) fail("quantize", "group and bits must be positive, got ", group, " and ", bits);
  TorchTensor codes = torch::stable::new_empty(x, scaled_shape(v, v.ndim - 1, part.bits, 8), ScalarType::Byte);
  const std::vector<int64_t> scales = scaled_shape(v, group_dim, 1, part.group);
  TorchTensor scale = torch::stable::new_empty(x, scales, ScalarType::Half);
  TorchTensor min = torch::stable::new_empty(x, scales, ScalarType::Half);
  quantize({v, part, clip, view(codes), view(scale), view(min)}, TorchContext(x));
  return {codes, scale, min};
}

TorchTensor dequantize_op(TorchTensor codes, TorchTensor scale, TorchTensor min, int64_t bits, int64_t group,
                          int64_t axis, ScalarType dtype) {
  const QuantPart part = part_of("dequantize", bits, group, axis);
  const Tensor v = view(codes);
  if (v.ndim < 1 || v.ndim + axis < 0) {
    fail("dequantize", "codes must have shape ", axis == -1 ? "[..., bytes]" : "[..., T, bytes]", ", got ",
         shape_string(v));
  }
  if (part.bits < 1) fail("dequantize", "bits must be 2, 3, 4 or 8, got ", bits);
  TorchTensor x = torch::stable::new_empty(codes, scaled_shape(v, v.ndim - 1, 8, part.bits), dtype);
  dequantize({v, view(scale), view(min), part, view(x)}, TorchContext(codes));
  return x;
}

Numbers quant_layout_op(Numbers fmt) {
  const QuantFormat format = quant_format("_quant_layout", fmt);
  Numbers result;
  for (const QuantLayout& layout : {format.k_layout(), format.v_layout()}) {
    result.insert(result.end(),
                  {layout.row_bytes, layout.num_scales, layout.scale_offset, layout.min_offset, layout.record_bytes});
  }
  return result;
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def(
      "quantize_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor dst, "
      "int[] fmt, *, float k_clip=1.0, float v_clip=1.0, Tensor? k_permutation=None) -> ()");
  m.def(
      "dequantize_pages(Tensor k_pool, Tensor v_pool, Tensor ids, int[] fmt, ScalarType dtype, *, "
      "Tensor? k_permutation=None) -> (Tensor k, Tensor v)");
  m.def(
      "quantize(Tensor x, int bits, int group, int axis=-1, *, float clip=1.0) -> (Tensor codes, Tensor scale, Tensor min)");
  m.def(
      "dequantize(Tensor codes, Tensor scale, Tensor min, int bits, int group, int axis=-1, *, ScalarType dtype=float) -> Tensor");
  // Of K and then of V: row_bytes, num_scales, scale_offset, min_offset, record_bytes.
  m.def("_quant_layout(int[] fmt) -> int[]");
}

#define KVK_QUANT_IMPLS(m)                                     \
  m.impl("quantize_pages", TORCH_BOX(&quantize_pages_op));     \
  m.impl("dequantize_pages", TORCH_BOX(&dequantize_pages_op)); \
  m.impl("quantize", TORCH_BOX(&quantize_op));                 \
  m.impl("dequantize", TORCH_BOX(&dequantize_op))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_QUANT_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_QUANT_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("_quant_layout", TORCH_BOX(&quant_layout_op)); }

}  // namespace kvk::torch_face
