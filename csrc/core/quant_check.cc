// Checks that the quantized ops share, and a format from its numbers.
#include "core/quant_check.h"

namespace kvk {

void check_quant_part(const char* op, const char* name, const QuantPart& part, int64_t tokens, const char* tokens_name,
                      int64_t dim, const char* dim_name) {
  if (part.bits != 2 && part.bits != 3 && part.bits != 4 && part.bits != 8) {
    fail(op, name, "bits must be 2, 3, 4 or 8, got ", part.bits);
  }
  if (part.group < 16 || part.group > 128) fail(op, name, "group must be 16 to 128, got ", part.group);
  if (part.along_tokens && tokens % part.group != 0) {
    fail(op, name, "group must divide the ", tokens_name, " of ", tokens, ", along which it runs, got ", part.group);
  }
  if (!part.along_tokens && (dim % part.group != 0 || part.group % 8 != 0)) {
    fail(op, name, "group must be a multiple of 8 that divides the ", dim_name, " of ", dim,
         ", along which it runs, got ", part.group);
  }
}

QuantFormat quant_format(const char* op, const std::vector<int64_t>& numbers) {
  constexpr size_t kCount = 11;
  constexpr int64_t kMaxPage = 65536;
  if (numbers.size() != kCount) fail(op, "fmt must be ", kCount, " numbers, got ", numbers.size());
  QuantFormat format = {numbers[0], numbers[1], numbers[2], {}, {}};
  if (format.page_size < 1 || format.page_size > kMaxPage) {
    fail(op, "fmt: page_size must be 1 to ", kMaxPage, ", got ", format.page_size);
  }
  const ArgChecker check(op, Device{});
  check.head_dim(format.head_dim, "fmt", "D");
  check.head_dim(format.head_dim_v, "fmt", "Dv");
  const auto part = [&](size_t at, const char* name, int64_t dim, const char* dim_name) {
    for (size_t i = at; i < at + 4; ++i) {
      if (numbers[i] < 0 || numbers[i] > kMaxPage) fail(op, name, "parameters are out of range, got ", numbers[i]);
    }
    const int64_t axis = numbers[at + 2], rotate = numbers[at + 3];
    if (axis > 1) fail(op, name, "axis must be 0 (channel) or 1 (token), got ", axis);
    const QuantPart result = {static_cast<int32_t>(numbers[at]), static_cast<int32_t>(numbers[at + 1]), axis == 0,
                              static_cast<int32_t>(rotate)};
    check_quant_part(op, name, result, format.page_size, "page_size", dim, dim_name);
    if (rotate > 0 && (hadamard_order(rotate * dim) == 0)) {
      fail(op, name, "rotate needs a ", dim_name,
           " that gives, times the heads, a Hadamard matrix, m * 2**k with m in {1, 12, 20, 28, 40} and at most ",
           kMaxHadamard, ", got ", rotate, " times ", dim);
    }
    return result;
  };
  format.k = part(3, "fmt: k_", format.head_dim, "head_dim");
  format.v = part(7, "fmt: v_", format.head_dim_v, "head_dim_v");
  return format;
}

}  // namespace kvk
