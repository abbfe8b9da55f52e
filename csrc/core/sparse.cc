// The ops over records of bitmaps: checks, and their way to a backend.
#include "kvk/sparse.h"

#include "core/describe.h"
#include "core/paged_check.h"
#include "core/run_attention.h"
#include "core/sparse_check.h"

namespace kvk {

void compress_pages(const CompressPagesArgs& args, const Context& context) {
  const record::Scope recorded("compress_pages", context, [&] { return record::fields_of(args); });
  check_compress_pages(args);
  by_device(
      "compress_pages", args.k_pages, "k_pages", [&] { cpu::compress_pages(args, threads_of(context)); },
      [&] { cuda::compress_pages(args, context); });
}

void decompress_pages(const DecompressPagesArgs& args, const Context& context) {
  const record::Scope recorded("decompress_pages", context, [&] { return record::fields_of(args); });
  check_decompress_pages(args);
  by_device(
      "decompress_pages", args.k_pool, "k_pool", [&] { cpu::decompress_pages(args, threads_of(context)); },
      [&] { cuda::decompress_pages(args, context); });
}

void sparse_decode(const SparseDecodeArgs& args, const Context& context) {
  const record::Scope recorded("sparse_decode", context, [&] { return record::fields_of(args); });
  BitmapPools pools = {};
  const PagedProblem problem = check_sparse_decode(args, pools);
  run_attention("sparse_decode", problem, args.q, args.table.page_indices, context);
}

void sparse_prefill(const SparsePrefillArgs& args, const Context& context) {
  const record::Scope recorded("sparse_prefill", context, [&] { return record::fields_of(args); });
  BitmapPools pools = {};
  const PagedProblem problem = check_sparse_prefill(args, pools);
  run_attention("sparse_prefill", problem, args.q, args.table.page_indices, context);
}

}  // namespace kvk
