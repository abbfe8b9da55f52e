#include "core/record_check.h"

#include "core/value_errors.h"

namespace kvk {

void check_record_pool(const ArgChecker& check, const Tensor& pool, const char* name, int64_t num_pages,
                       int64_t num_kv_heads, int64_t record_bytes) {
  check.tensor(pool, name, DType::u8, {{"N", num_pages}, {"Hkv", num_kv_heads}, {"record_bytes", record_bytes}});
  check.last_stride_one(pool, name);
  if (reinterpret_cast<uintptr_t>(pool.data) % 16 != 0) {
    fail(check.op(), name, " must start on a multiple of 16 bytes");
  }
  for (int i = 0; i < 2; ++i) {
    if (pool.shape[i] > 1 && pool.stride[i] % 16 != 0) {
      fail(check.op(), name, " must have strides of whole 16 bytes, got ", pool.stride[i], " in dimension ", i);
    }
  }
}

void check_ids(const ArgChecker& check, const Tensor& ids, const char* name, int64_t count, int64_t num_pages) {
  check.tensor(ids, name, DType::i32, {{"n", count}});
  if (check.device().type != DeviceType::cpu) return;
  for (int64_t i = 0; i < ids.shape[0]; ++i) {
    const int64_t page = ids.ptr<const int32_t>()[i * ids.stride[0]];
    if (page < 0 || page >= num_pages) fail_id(check.op(), name, num_pages, page, i);
  }
}

}  // namespace kvk
