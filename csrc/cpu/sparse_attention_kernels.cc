// Attention over records of bitmaps at one instruction-set level: the engine with that format. In a file of its own because it
// compiles long; attend() and merge_splits() (paged_kernels.cc) lead here.
#include "cpu/engine/attend.h"
#include "cpu/engine/sparse.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// f(the attention of the problem's dtype and the records', as a type).
template <class F>
auto with_attention(const PagedProblem& problem, F&& f) {
  const bool is_bf16 = problem.bitmap->format.dtype == DType::bf16;
  if (problem.dtype == DType::f32) {
    if (is_bf16) return f(std::type_identity<Attention<float, BitmapPages<float, bf16>>>());
    return f(std::type_identity<Attention<float, BitmapPages<float, f16>>>());
  }
  if (is_bf16) return f(std::type_identity<Attention<bf16, BitmapPages<bf16, bf16>>>());
  return f(std::type_identity<Attention<f16, BitmapPages<f16, f16>>>());
}

}  // namespace

void attend_sparse(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials) {
  with_attention(
      problem, [&](auto type) { attend_item<typename decltype(type)::type>(problem, plan, item, scratch, partials); });
}

void merge_sparse_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials) {
  with_attention(problem, [&](auto type) { merge_item<typename decltype(type)::type>(problem, tile, partials); });
}

}  // namespace kvk::cpu::KVK_LEVEL
