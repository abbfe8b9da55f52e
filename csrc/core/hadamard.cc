// Checks of hadamard, and its way to a backend.
#include "kvk/hadamard.h"

#include <cmath>

#include "core/backend.h"
#include "core/describe.h"
#include "cpu/backend.h"
#include "cuda/backend.h"

namespace kvk {

void hadamard(const HadamardArgs& args, const Context& context) {
  const record::Scope recorded("hadamard", context, [&] { return record::fields_of(args); });
  const ArgChecker check("hadamard", args.x.device);
  const Tensor& x = args.x;
  check.float_dtype(x, "x");
  if (x.ndim < 1) fail(check.op(), "x must have shape [..., n], got []");
  const int64_t n = x.shape[x.ndim - 1];
  if (hadamard_order(n) == 0) {
    fail(check.op(), "x: the last dimension must be m * 2**k with m in {1, 12, 20, 28, 40}, at most ", kMaxHadamard,
         ", got ", n);
  }
  check.last_stride_one(x, "x");
  if (args.scale) check.finite(*args.scale, "scale");
  check.same_shape(args.out, "out", x, "x");
  check.last_stride_one(args.out, "out");
  check.writable(args.out, "out");
  HadamardArgs full = args;
  full.scale = args.scale.value_or(1.0 / std::sqrt(static_cast<double>(n)));
  by_device(
      check.op(), x, "x", [&] { cpu::hadamard(full, threads_of(context)); }, [&] { cuda::hadamard(full, context); });
}

}  // namespace kvk
