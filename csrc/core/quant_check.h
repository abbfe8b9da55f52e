// Checks that the quantized ops share.
#pragma once

#include "core/check.h"
#include "kvk/hadamard.h"
#include "kvk/quant.h"

namespace kvk {

// bits and group against the extents they divide; `name` comes before "bits" and "group" in messages.
void check_quant_part(const char* op, const char* name, const QuantPart& part, int64_t tokens, const char* tokens_name,
                      int64_t dim, const char* dim_name);

// A pool of records of K or V: u8 [N, Hkv, record_bytes], each record on a multiple of 16 bytes.
void check_record_pool(const ArgChecker& check, const Tensor& pool, const char* name, int64_t num_pages,
                       int64_t num_kv_heads, int64_t record_bytes);

}  // namespace kvk
