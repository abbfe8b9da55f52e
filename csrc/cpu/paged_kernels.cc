// Paged attention at one instruction-set level: the engine's entry points.
//
// Bytes: each key and value once, 2 * keys * Hkv * D * size, plus q and out; FLOPs: 4 * Hq * D per (query, key).
// Decode (a stream tile) is bound by memory up to about 4 query heads a kv head on AVX2, then by multiply-adds and loads;
// prefill (a panel tile) by multiply-adds, two vectors of a panel against 6 (12) rows: 12 (24) of them for 8 (14) loads.
#include <type_traits>

#include "cpu/engine/attend.h"
#include "cpu/engine/quant.h"
#include "cpu/engine/restored.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {

template class DenseStream<float>;
template class DenseStream<bf16>;
template class DenseStream<f16>;

namespace {

// f(the attention of the problem's format, as a type).
template <class F>
void with_attention(const PagedProblem& problem, F&& f) {
  if (problem.quant == nullptr) {
    with_dtype(problem.dtype, [&](auto element) { f(std::type_identity<Attention<DensePages<decltype(element)>>>()); });
  } else if (problem.quant->restored()) {
    f(std::type_identity<Attention<RestoredPages>>());
  } else {
    f(std::type_identity<Attention<QuantPages>>());
  }
}

}  // namespace

int64_t attention_scratch_bytes(const PagedProblem& problem, const Plan& plan) {
  Scratch scratch = {};
  return std::max(scratch.carve(nullptr, problem, plan.max_stream_rows, plan.max_stream_rows, false),
                  scratch.carve(nullptr, problem, plan.max_panel_rows, plan.max_panel_rows_per_head, true));
}

void attend(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials) {
  if (problem.bitmap != nullptr) return attend_sparse(problem, plan, item, scratch, partials);
  with_attention(
      problem, [&](auto type) { attend_item<typename decltype(type)::type>(problem, plan, item, scratch, partials); });
}

void merge_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials) {
  if (problem.bitmap != nullptr) return merge_sparse_splits(problem, tile, partials);
  with_attention(problem, [&](auto type) { merge_item<typename decltype(type)::type>(problem, tile, partials); });
}

}  // namespace kvk::cpu::KVK_LEVEL
