// Checks that the ops over records of any format share.
#pragma once

#include "core/check.h"

namespace kvk {

// A pool of records of K or V: u8 [N, Hkv, record_bytes], each record on a multiple of 16 bytes.
void check_record_pool(const ArgChecker& check, const Tensor& pool, const char* name, int64_t num_pages,
                       int64_t num_kv_heads, int64_t record_bytes);

// Page ids: int32 [n], each within the pool. Values on a card are trusted.
void check_ids(const ArgChecker& check, const Tensor& ids, const char* name, int64_t count, int64_t num_pages);

}  // namespace kvk
