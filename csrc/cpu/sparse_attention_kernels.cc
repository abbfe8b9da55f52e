// Attention over records of bitmaps at one instruction-set level: the engine with that format. In a file of its own because it
// compiles long; attend() and merge_splits() (paged_kernels.cc) lead here.
#include "cpu/engine/attend.h"
#include "cpu/engine/sparse.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {
void attend_sparse(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials) {
  attend_item<Attention<BitmapPages>>(problem, plan, item, scratch, partials);
}

void merge_sparse_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials) {
  merge_item<Attention<BitmapPages>>(problem, tile, partials);
}

}  // namespace kvk::cpu::KVK_LEVEL
