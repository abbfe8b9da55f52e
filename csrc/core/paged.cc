// The paged ops: checks, then the backend.
#include "kvk/paged.h"

#include "core/check.h"
#include "core/paged_check.h"
#include "cpu/backend.h"

namespace kvk {

void paged_decode(const PagedDecodeArgs& args, Threads& threads) {
  ArgChecker("paged_decode", args.q.device).cpu_only(args.q, "q");
  cpu::paged_attention(check_paged_decode(args), threads);
}

void paged_prefill(const PagedPrefillArgs& args, Threads& threads) {
  ArgChecker("paged_prefill", args.q.device).cpu_only(args.q, "q");
  cpu::paged_attention(check_paged_prefill(args), threads);
}

void append_kv(const AppendKvArgs& args, Threads& threads) {
  ArgChecker("append_kv", args.k.device).cpu_only(args.k, "k");
  check_append_kv(args);
  cpu::append_kv(args, threads);
}

}  // namespace kvk
