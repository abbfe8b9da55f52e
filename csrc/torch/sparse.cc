// torch.ops.kvk: bitmap-sparse pages. A format travels as the integers that kvk::bitmap_format reads (kvk.BitmapFormat.numbers).
#include "kvk/sparse.h"

#include <tuple>
#include <vector>

#include "core/check.h"
#include "torch/adapter.h"
#include "torch/score_options.h"

namespace kvk::torch_face {
namespace {

using torch::headeronly::ScalarType;
using Numbers = std::vector<int64_t>;

void compress_pages_op(TorchTensor k_pages, TorchTensor v_pages, TorchTensor src, TorchTensor k_pool,
                       TorchTensor v_pool, TorchTensor dst, Numbers fmt, MaybeTensor k_select, MaybeTensor v_select) {
  compress_pages({view(k_pages), view(v_pages), view(src), view(k_pool), view(v_pool), view(dst),
                  bitmap_format("compress_pages", fmt), view(k_select), view(v_select)},
                 TorchContext(k_pages));
}

std::tuple<TorchTensor, TorchTensor> decompress_pages_op(TorchTensor k_pool, TorchTensor v_pool, TorchTensor ids,
                                                         Numbers fmt) {
  const BitmapFormat format = bitmap_format("decompress_pages", fmt);
  require_rank("decompress_pages", k_pool, "k_pool", 3, "[N, Hkv, record_bytes]");
  require_rank("decompress_pages", ids, "ids", 1, "[n]");
  const ScalarType dtype = format.dtype == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
  const int64_t n = ids.size(0), heads = k_pool.size(1);
  TorchTensor k = new_tensor(k_pool, {n, format.page_size, heads, format.head_dim}, dtype);
  TorchTensor v = new_tensor(k_pool, {n, format.page_size, heads, format.head_dim_v}, dtype);
  decompress_pages({view(k_pool), view(v_pool), view(ids), format, view(k), view(v)}, TorchContext(k_pool));
  return {k, v};
}

Numbers bitmap_layout_op(Numbers fmt) {
  const BitmapFormat format = bitmap_format("_bitmap_layout", fmt);
  Numbers result;
  for (const BitmapLayout& layout : {format.k_layout(), format.v_layout()}) {
    result.insert(result.end(),
                  {layout.value_row_bytes, layout.bitmap_row_bytes, layout.bitmap_offset, layout.record_bytes});
  }
  return result;
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def(
      "compress_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor dst, "
      "int[] fmt, *, Tensor? k_select=None, Tensor? v_select=None) -> ()");
  m.def("decompress_pages(Tensor k_pool, Tensor v_pool, Tensor ids, int[] fmt) -> (Tensor k, Tensor v)");
  // Of K and then of V: value_row_bytes, bitmap_row_bytes, bitmap_offset, record_bytes.
  m.def("_bitmap_layout(int[] fmt) -> int[]");
}

#define KVK_SPARSE_IMPLS(m)                                \
  m.impl("compress_pages", TORCH_BOX(&compress_pages_op)); \
  m.impl("decompress_pages", TORCH_BOX(&decompress_pages_op))

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CPU, m) { KVK_SPARSE_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CUDA, m) { KVK_SPARSE_IMPLS(m); }
KVK_LIBRARY_IMPL(KVK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_bitmap_layout", TORCH_BOX(&bitmap_layout_op));
}

}  // namespace kvk::torch_face
