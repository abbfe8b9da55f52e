// Checks that the quantized ops share.
#pragma once

#include "core/check.h"
#include "core/record_check.h"
#include "kvk/hadamard.h"
#include "kvk/quant.h"

namespace kvk {

// bits and group against the extents they divide; `name` comes before "bits" and "group" in messages.
void check_quant_part(const char* op, const char* name, const QuantPart& part, int64_t tokens, const char* tokens_name,
                      int64_t dim, const char* dim_name);

}  // namespace kvk
