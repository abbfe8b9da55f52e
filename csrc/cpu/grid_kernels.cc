// Attention over ordinary tensors at one instruction-set level: the engine's entry points.
//
// FLOPs of a step of R rows and C columns: 2 R C (D + Dv) forward, 2 R C (2 D + Dv) for dQ, 4 R C (D + Dv) for dK and dV.
// Bound by multiply-adds, like a panel tile of paged prefill; a tile of fewer rows pays more for unpacking its columns.
#include "cpu/engine/grid.h"
#include "cpu/engine/grid_gradient.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// f(the engine of the pass and dtype, as a type).
template <class F>
auto with_engine(GridPass pass, DType dtype, F&& f) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    switch (pass) {
      case GridPass::attention: return f(std::type_identity<GridAttention<T>>());
      case GridPass::query_gradient: return f(std::type_identity<GridGradient<T, true>>());
      default: return f(std::type_identity<GridGradient<T, false>>());
    }
  };
  switch (dtype) {
    case DType::bf16: return of(bf16{});
    case DType::f16: return of(f16{});
    default: return of(float{});
  }
}

}  // namespace

int64_t grid_scratch_bytes(GridPass pass, const GridProblem& problem, int max_rows) {
  return with_engine(pass, problem.dtype,
                     [&](auto engine) { return decltype(engine)::type::scratch_bytes(problem, max_rows); });
}

void grid_tile(GridPass pass, const GridProblem& problem, GridSchedule& schedule, int64_t tile, void* scratch) {
  with_engine(pass, problem.dtype,
              [&](auto engine) { typename decltype(engine)::type(problem, schedule, tile, scratch).run(); });
}

}  // namespace kvk::cpu::KVK_LEVEL
