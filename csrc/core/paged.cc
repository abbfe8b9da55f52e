// The paged ops: checks, then the backend.
#include "kvk/paged.h"

#include "core/backend.h"
#include "core/describe.h"
#include "core/paged_check.h"
#include "core/run_attention.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {

void paged_decode(const PagedDecodeArgs& args, const Context& context) {
  const record::Scope recorded("paged_decode", context, [&] { return record::fields_of(args); });
  run_attention("paged_decode", check_paged_decode(args), args.q, args.table.page_indices, context);
}

void paged_prefill(const PagedPrefillArgs& args, const Context& context) {
  const record::Scope recorded("paged_prefill", context, [&] { return record::fields_of(args); });
  run_attention("paged_prefill", check_paged_prefill(args), args.q, args.table.page_indices, context);
}

void append_kv(const AppendKvArgs& args, const Context& context) {
  const record::Scope recorded("append_kv", context, [&] { return record::fields_of(args); });
  check_append_kv(args);
  by_device(
      "append_kv", args.k, "k", [&] { cpu::append_kv(args, threads_of(context)); },
      [&] { cuda::append_kv(args, context); });
}

}  // namespace kvk
