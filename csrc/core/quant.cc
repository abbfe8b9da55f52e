// Checks of the ops that make and read quantized records, and their way to a backend.
#include "core/backend.h"
#include "core/describe.h"
#include "core/joint_check.h"
#include "core/paged_check.h"
#include "core/quant_check.h"
#include "core/run_attention.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {
namespace {

void check_clip(const ArgChecker& check, double clip, const char* name) {
  if (!(clip > 0.0 && clip <= 1.0)) fail(check.op(), name, " must be over 0 and at most 1, got ", clip);
}

// [..., T, n] and its codes and scales.
void check_rows(const ArgChecker& check, const Tensor& x, const char* x_name, const QuantPart& part,
                const Tensor& codes, const Tensor& scale, const Tensor& min) {
  check.float_dtype(x, x_name);
  if (x.ndim < 1) fail(check.op(), x_name, " must have shape [..., n], got []");
  const int64_t n = x.shape[x.ndim - 1], tokens = x.ndim > 1 ? x.shape[x.ndim - 2] : 1;
  if (n % 8 != 0) fail(check.op(), x_name, ": the last dimension must be a multiple of 8, got ", n);
  check_quant_part(check.op(), "", part, tokens, "next to last dimension", n, "last dimension");
  check.last_stride_one(x, x_name);
  Tensor want = x;
  want.dtype = DType::u8;
  want.shape[x.ndim - 1] = n * part.bits / 8;
  check.same_shape(codes, "codes", want, "its part of the input");
  check.contiguous(codes, "codes");
  want = x;
  want.dtype = DType::f16;
  want.shape[part.along_tokens ? x.ndim - 2 : x.ndim - 1] /= part.group;
  check.same_shape(scale, "scale", want, "its part of the input");
  check.contiguous(scale, "scale");
  check.same_shape(min, "min", want, "its part of the input");
  check.contiguous(min, "min");
}

}  // namespace

void quantize_pages(const QuantizePagesArgs& args, const Context& context) {
  const record::Scope recorded("quantize_pages", context, [&] { return record::fields_of(args); });
  const ArgChecker check("quantize_pages", args.k_pages.device);
  const QuantFormat& format = args.format;
  check.float_dtype(args.k_pages, "k_pages");
  const DType dtype = args.k_pages.dtype;
  check.tensor(args.k_pages, "k_pages", dtype, {{"M"}, {"P", format.page_size}, {"Hkv"}, {"D", format.head_dim}});
  const int64_t num_dense = args.k_pages.shape[0], num_kv_heads = args.k_pages.shape[2];
  check.tensor(args.v_pages, "v_pages", dtype,
               {{"M", num_dense}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"Dv", format.head_dim_v}});
  check.last_stride_one(args.k_pages, "k_pages");
  check.last_stride_one(args.v_pages, "v_pages");
  check.tensor(args.src, "src", DType::i32, {{"n"}});
  check_ids(check, args.src, "src", args.src.shape[0], num_dense);
  check_record_pool(check, args.k_pool, "k_pool", -1, num_kv_heads, format.k_layout().record_bytes);
  const int64_t num_pages = args.k_pool.shape[0];
  check_record_pool(check, args.v_pool, "v_pool", num_pages, num_kv_heads, format.v_layout().record_bytes);
  check.writable(args.k_pool, "k_pool");
  check.writable(args.v_pool, "v_pool");
  check_ids(check, args.dst, "dst", args.src.shape[0], num_pages);
  check_clip(check, args.k_clip, "k_clip");
  check_clip(check, args.v_clip, "v_clip");
  refuse_joint_on_a_card(check, format, args.k_permutation.has_value(), false);
  check_joint_heads(check, format, num_kv_heads);
  check_permutation(check, args.k_permutation, format, num_kv_heads);
  by_device(
      check.op(), args.k_pages, "k_pages", [&] { cpu::quantize_pages(args, threads_of(context)); },
      [&] { cuda::quantize_pages(args, context); });
}

void dequantize_pages(const DequantizePagesArgs& args, const Context& context) {
  const record::Scope recorded("dequantize_pages", context, [&] { return record::fields_of(args); });
  const ArgChecker check("dequantize_pages", args.k_pool.device);
  const QuantFormat& format = args.format;
  check_record_pool(check, args.k_pool, "k_pool", -1, -1, format.k_layout().record_bytes);
  const int64_t num_pages = args.k_pool.shape[0], num_kv_heads = args.k_pool.shape[1];
  check_record_pool(check, args.v_pool, "v_pool", num_pages, num_kv_heads, format.v_layout().record_bytes);
  check.tensor(args.ids, "ids", DType::i32, {{"n"}});
  const int64_t n = args.ids.shape[0];
  check_ids(check, args.ids, "ids", n, num_pages);
  check.float_dtype(args.k, "k");
  check.tensor(args.k, "k", args.k.dtype,
               {{"n", n}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"D", format.head_dim}});
  check.tensor(args.v, "v", args.k.dtype,
               {{"n", n}, {"P", format.page_size}, {"Hkv", num_kv_heads}, {"Dv", format.head_dim_v}});
  for (const Tensor* out : {&args.k, &args.v}) {
    check.last_stride_one(*out, out == &args.k ? "k" : "v");
    check.writable(*out, out == &args.k ? "k" : "v");
  }
  refuse_joint_on_a_card(check, format, args.k_permutation.has_value(), false);
  check_joint_heads(check, format, num_kv_heads);
  check_permutation(check, args.k_permutation, format, num_kv_heads);
  by_device(
      check.op(), args.k_pool, "k_pool", [&] { cpu::dequantize_pages(args, threads_of(context)); },
      [&] { cuda::dequantize_pages(args, context); });
}

void quant_decode(const QuantDecodeArgs& args, const Context& context) {
  const record::Scope recorded("quant_decode", context, [&] { return record::fields_of(args); });
  QuantPools pools = {};
  refuse_joint_on_a_card(ArgChecker("quant_decode", args.q.device), args.format, args.k_permutation.has_value(),
                         args.k_rope.has_value());
  const PagedProblem problem = check_quant_decode(args, pools);
  run_attention("quant_decode", problem, args.q, args.table.page_indices, context);
}

void quant_prefill(const QuantPrefillArgs& args, const Context& context) {
  const record::Scope recorded("quant_prefill", context, [&] { return record::fields_of(args); });
  QuantPools pools = {};
  refuse_joint_on_a_card(ArgChecker("quant_prefill", args.q.device), args.format, args.k_permutation.has_value(),
                         args.k_rope.has_value());
  const PagedProblem problem = check_quant_prefill(args, pools);
  run_attention("quant_prefill", problem, args.q, args.table.page_indices, context);
}

void quantize(const QuantizeArgs& args, const Context& context) {
  const record::Scope recorded("quantize", context, [&] { return record::fields_of(args); });
  const ArgChecker check("quantize", args.x.device);
  check_rows(check, args.x, "x", args.part, args.codes, args.scale, args.min);
  check_clip(check, args.clip, "clip");
  by_device(
      check.op(), args.x, "x", [&] { cpu::quantize(args, threads_of(context)); },
      [&] { cuda::quantize(args, context); });
}

void dequantize(const DequantizeArgs& args, const Context& context) {
  const record::Scope recorded("dequantize", context, [&] { return record::fields_of(args); });
  const ArgChecker check("dequantize", args.codes.device);
  check_rows(check, args.x, "x", args.part, args.codes, args.scale, args.min);
  check.writable(args.x, "x");
  by_device(
      check.op(), args.codes, "codes", [&] { cpu::dequantize(args, threads_of(context)); },
      [&] { cuda::dequantize(args, context); });
}

}  // namespace kvk
