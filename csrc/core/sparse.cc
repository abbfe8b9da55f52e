// The ops over records of bitmaps: checks, and their way to a backend.
#include "kvk/sparse.h"

#include "core/backend.h"
#include "core/describe.h"
#include "core/paged_check.h"
#include "core/sparse_check.h"
#include "cpu/backend.h"

namespace kvk {
namespace {

void on_cpu_only(const char* op, const Tensor& first, const char* name) {
  by_device(op, first, name, [] {}, [&] { fail(op, name, " must be on cpu, got ", device_name(first.device)); });
}

}  // namespace

void compress_pages(const CompressPagesArgs& args, const Context& context) {
  const record::Scope recorded("compress_pages", context, [&] { return record::fields_of(args); });
  check_compress_pages(args);
  on_cpu_only("compress_pages", args.k_pages, "k_pages");
  cpu::compress_pages(args, threads_of(context));
}

void decompress_pages(const DecompressPagesArgs& args, const Context& context) {
  const record::Scope recorded("decompress_pages", context, [&] { return record::fields_of(args); });
  check_decompress_pages(args);
  on_cpu_only("decompress_pages", args.k_pool, "k_pool");
  cpu::decompress_pages(args, threads_of(context));
}

void sparse_decode(const SparseDecodeArgs& args, const Context& context) {
  const record::Scope recorded("sparse_decode", context, [&] { return record::fields_of(args); });
  BitmapPools pools = {};
  const PagedProblem problem = check_sparse_decode(args, pools);
  on_cpu_only("sparse_decode", args.q, "q");
  cpu::paged_attention(problem, threads_of(context));
}

void sparse_prefill(const SparsePrefillArgs& args, const Context& context) {
  const record::Scope recorded("sparse_prefill", context, [&] { return record::fields_of(args); });
  BitmapPools pools = {};
  const PagedProblem problem = check_sparse_prefill(args, pools);
  on_cpu_only("sparse_prefill", args.q, "q");
  cpu::paged_attention(problem, threads_of(context));
}

}  // namespace kvk
