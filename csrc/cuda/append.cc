// Launch code of append_kv.
#include "core/check.h"
#include "cuda/launch.h"
#include "kvk/device/append_kv_params.h"

namespace kvk::cuda {

bool rows_on_16_bytes(const Tensor& t) {
  const int64_t size = element_size(t.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.shape[t.ndim - 1] * size % 16 == 0;
  for (int i = 0; i + 1 < t.ndim; ++i) aligned &= t.shape[i] <= 1 || t.stride[i] * size % 16 == 0;
  return aligned;
}

void launch_append_kv(const AppendKvArgs& args, Launcher& launcher) {
  const auto rows = [](const Tensor& t) { return device::RowsView{t.data, t.stride[0], t.stride[1]}; };
  const auto pool = [](const Tensor& t) { return device::PoolView{t.data, t.stride[0], t.stride[1], t.stride[2]}; };
  device::AppendKvParams params = {};
  params.k = rows(args.k);
  params.v = rows(args.v);
  params.k_pages = pool(args.k_pages);
  params.v_pages = pool(args.v_pages);
  params.slots = args.slot_mapping.ptr<const int64_t>();
  params.slot_stride = args.slot_mapping.stride[0];
  params.num_tokens = args.k.shape[0];
  params.num_kv_heads = args.k.shape[1];
  params.page_size = args.k_pages.shape[1];
  params.num_slots = args.k_pages.shape[0] * params.page_size;
  params.head_dim = static_cast<int32_t>(args.k.shape[2]);
  params.head_dim_v = static_cast<int32_t>(args.v.shape[2]);
  params.vectors = rows_on_16_bytes(args.k) && rows_on_16_bytes(args.v) && rows_on_16_bytes(args.k_pages) &&
                   rows_on_16_bytes(args.v_pages);
  const int64_t warps = params.num_tokens * params.num_kv_heads;
  const char* expression =
      element_size(args.k.dtype) == 2 ? "kvk::device::append_kv_kernel<2>" : "kvk::device::append_kv_kernel<4>";
  launch(launcher, {"kvk/device/append_kv.cuh", expression},
         {static_cast<uint32_t>(device::ceil_div<int64_t>(warps, 4)), 1, 1}, 128, 0, params);
}

}  // namespace kvk::cuda
