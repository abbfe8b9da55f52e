// Paged attention at one instruction-set level: the engine's entry points.
//
// Bytes: each key and value once, 2 * keys * Hkv * D * size, plus q and out; FLOPs: 4 * Hq * D per (query, key).
// Decode (a stream tile) is bound by memory up to about 4 query heads a kv head on AVX2, then by multiply-adds and loads;
// prefill (a panel tile) by multiply-adds, two vectors of a panel against 6 (12) rows: 12 (24) of them for 8 (14) loads.
#include <type_traits>

#include "cpu/engine/attend.h"
#include "cpu/engine/quant.h"
#include "cpu/kernels.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

template <class F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

// f(the attention of the problem's dtype and format, as a type).
template <class F>
auto with_attention(const PagedProblem& problem, F&& f) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (problem.quant != nullptr) return f(std::type_identity<Attention<T, QuantPages<T>>>());
    return f(std::type_identity<Attention<T, DensePages<T>>>());
  });
}

}  // namespace

int64_t attention_scratch_bytes(const PagedProblem& problem, const Plan& plan) {
  Scratch scratch = {};
  return std::max(scratch.carve(nullptr, problem, plan.max_stream_rows, plan.max_stream_rows, false),
                  scratch.carve(nullptr, problem, plan.max_panel_rows, plan.max_panel_rows_per_head, true));
}

void attend(const PagedProblem& problem, const Plan& plan, Item item, void* scratch, const Partials& partials) {
  with_attention(problem, [&](auto type) {
    typename decltype(type)::type attention(problem, plan, item, scratch);
    attention.run();
    if (plan.tiles[static_cast<size_t>(item.tile)].num_splits > 1) {
      attention.write_partial(partials, item.split);
    } else {
      attention.write_output();
    }
  });
}

void merge_splits(const PagedProblem& problem, const Tile& tile, const Partials& partials) {
  with_attention(problem, [&](auto type) {
    const int rows = tile.rows(problem.group);
    alignas(64) float acc[padded(256)];
    for (int r = 0; r < rows; ++r) {
      SoftmaxRow merged;
      for (int s = 0; s < tile.num_splits; ++s) {
        const float max = partials.max[tile.partial + int64_t{s} * rows + r];
        merged.max = max > merged.max ? max : merged.max;
      }
      std::fill(acc, acc + padded(problem.head_dim_v), 0.0f);
      for (int s = 0; s < tile.num_splits; ++s) {
        const int64_t row = tile.partial + int64_t{s} * rows + r;
        if (partials.max[row] == -kInf) continue;
        const float factor = std::exp(partials.max[row] - merged.max);
        merged.sum += partials.sum[row] * factor;
        const float* part = partials.out + row * partials.out_stride;
        for (int d = 0; d < problem.head_dim_v; d += W) store(load(acc + d) + load(part + d) * factor, acc + d);
      }
      decltype(type)::type::finish(problem, tile, r, acc, merged);
    }
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
