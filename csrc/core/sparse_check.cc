#include "core/sparse_check.h"

#include <bit>

#include "core/record_check.h"
#include "core/value_errors.h"
#include "kvk/hadamard.h"

namespace kvk {
namespace {

// Bits of one row of a mask: bool [D], or u8 [D / 8].
int64_t count_selected(const Tensor& select, const uint8_t* row, int64_t count) {
  int64_t selected = 0;
  for (int64_t i = 0; i < count; ++i) {
    selected += select.dtype == DType::boolean ? row[i] != 0 : std::popcount(row[i]);
  }
  return selected;
}

void check_select(const ArgChecker& check, const std::optional<Tensor>& select, const char* name, int64_t n,
                  int64_t page_size, int64_t num_kv_heads, int64_t dim, int32_t keep) {
  if (!select) return;
  const Tensor& t = *select;
  if (t.dtype != DType::f32 && t.dtype != DType::boolean && t.dtype != DType::u8) {
    fail(check.op(), name, " must be float32 (scores), bool (a mask) or uint8 (bitmaps), got ", dtype_name(t.dtype));
  }
  const int64_t row = t.dtype == DType::u8 ? dim / 8 : dim;
  check.tensor(t, name, t.dtype,
               {{"n", n}, {"P", page_size}, {"Hkv", num_kv_heads}, {t.dtype == DType::u8 ? "D / 8" : "D", row}});
  check.last_stride_one(t, name);
  if (t.dtype == DType::f32 || check.device().type != DeviceType::cpu) return;
  for (int64_t i = 0; i < n * page_size * num_kv_heads; ++i) {
    const int64_t head = i % num_kv_heads, token = i / num_kv_heads % page_size, page = i / num_kv_heads / page_size;
    const int64_t at = page * t.stride[0] + token * t.stride[1] + head * t.stride[2];
    const int64_t selected = count_selected(t, t.ptr<const uint8_t>() + at, row);
    if (selected > keep) fail_selected(check.op(), name, keep, selected, page, token, head);
  }
}

}  // namespace

BitmapFormat bitmap_format(const char* op, const std::vector<int64_t>& numbers) {
  constexpr size_t kCount = 8;
  constexpr int64_t kMaxPage = 65536;
  if (numbers.size() != kCount) fail(op, "fmt must be ", kCount, " numbers, got ", numbers.size());
  BitmapFormat format = {numbers[0], numbers[1], numbers[2], DType::bf16, {}, {}};
  if (format.page_size < 1 || format.page_size > kMaxPage) {
    fail(op, "fmt: page_size must be 1 to ", kMaxPage, ", got ", format.page_size);
  }
  const ArgChecker check(op, Device{});
  check.head_dim(format.head_dim, "fmt", "D");
  check.head_dim(format.head_dim_v, "fmt", "Dv");
  if (numbers[3] != 0 && numbers[3] != 1) fail(op, "fmt: dtype must be 0 (bfloat16) or 1 (float16), got ", numbers[3]);
  format.dtype = numbers[3] == 0 ? DType::bf16 : DType::f16;
  const auto part = [&](size_t at, const char* name, int64_t dim, const char* dim_name) -> BitmapPart {
    const int64_t keep = numbers[at], rotate = numbers[at + 1];
    if (keep < 8 || keep > dim || keep % 8 != 0) {
      fail(op, name, "keep must be a multiple of 8 from 8 to the ", dim_name, " of ", dim, ", got ", keep);
    }
    if (rotate != 0 && rotate != 1) fail(op, name, "rotate must be 0 or 1, got ", rotate);
    if (rotate == 1 && hadamard_order(dim) == 0) {
      fail(op, name, "rotate needs a ", dim_name,
           " with a Hadamard matrix, m * 2**k with m in {1, 12, 20, 28, 40}, got ", dim);
    }
    return {static_cast<int32_t>(keep), static_cast<int32_t>(rotate)};
  };
  format.k = part(4, "fmt: k_", format.head_dim, "head_dim");
  format.v = part(6, "fmt: v_", format.head_dim_v, "head_dim_v");
  return format;
}

void check_compress_pages(const CompressPagesArgs& args) {
  const ArgChecker check("compress_pages", args.k_pages.device);
  const BitmapFormat& format = args.format;
  const DType dtype = args.k_pages.dtype;
  if (dtype != DType::f32 && dtype != format.dtype) {
    fail(check.op(), "k_pages must be ", dtype_name(format.dtype), " like the format, or float32, got ",
         dtype_name(dtype));
  }
  check.tensor(args.k_pages, "k_pages", dtype, {{"M"}, {"P", format.page_size}, {"Hkv"}, {"D", format.head_dim}});
  const int64_t num_dense = args.k_pages.shape[0], num_kv_heads = args.k_pages.shape[2];
  check.tensor(args.v_pages, "v_pages", dtype,
               {{"M", num_dense}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"Dv", format.head_dim_v}});
  check.last_stride_one(args.k_pages, "k_pages");
  check.last_stride_one(args.v_pages, "v_pages");
  check.tensor(args.src, "src", DType::i32, {{"n"}});
  const int64_t n = args.src.shape[0];
  check_ids(check, args.src, "src", n, num_dense);
  check_record_pool(check, args.k_pool, "k_pool", -1, num_kv_heads, format.k_layout().record_bytes);
  const int64_t num_pages = args.k_pool.shape[0];
  check_record_pool(check, args.v_pool, "v_pool", num_pages, num_kv_heads, format.v_layout().record_bytes);
  check.writable(args.k_pool, "k_pool");
  check.writable(args.v_pool, "v_pool");
  check_ids(check, args.dst, "dst", n, num_pages);
  check_select(check, args.k_select, "k_select", n, format.page_size, num_kv_heads, format.head_dim, format.k.keep);
  check_select(check, args.v_select, "v_select", n, format.page_size, num_kv_heads, format.head_dim_v, format.v.keep);
}

void check_decompress_pages(const DecompressPagesArgs& args) {
  const ArgChecker check("decompress_pages", args.k_pool.device);
  const BitmapFormat& format = args.format;
  check_record_pool(check, args.k_pool, "k_pool", -1, -1, format.k_layout().record_bytes);
  const int64_t num_pages = args.k_pool.shape[0], num_kv_heads = args.k_pool.shape[1];
  check_record_pool(check, args.v_pool, "v_pool", num_pages, num_kv_heads, format.v_layout().record_bytes);
  check.tensor(args.ids, "ids", DType::i32, {{"n"}});
  const int64_t n = args.ids.shape[0];
  check_ids(check, args.ids, "ids", n, num_pages);
  check.tensor(args.k, "k", format.dtype,
               {{"n", n}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"D", format.head_dim}});
  check.tensor(args.v, "v", format.dtype,
               {{"n", n}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"Dv", format.head_dim_v}});
  for (const Tensor* out : {&args.k, &args.v}) {
    check.last_stride_one(*out, out == &args.k ? "k" : "v");
    check.writable(*out, out == &args.k ? "k" : "v");
  }
}

}  // namespace kvk
