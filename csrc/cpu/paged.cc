// Paged attention and append on the CPU: work for the threads, whatever the instruction-set level.
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/backend.h"
#include "cpu/levels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace kvk::cpu {
namespace {

// Below this many bytes of keys and values a call is quicker on the calling thread alone.
constexpr int64_t kSerialBytes = 64 * 1024;

int64_t kv_bytes(const PagedProblem& p, const Plan& plan) {
  int64_t keys = 0;
  for (const Tile& tile : plan.tiles) {
    keys += (tile.key_end - tile.key_begin) * (tile.head_end - tile.head_begin) * (tile.stream ? 1 : tile.num_tokens);
  }
  return keys * (p.head_dim + p.head_dim_v) * element_size(p.dtype);
}

// Rows of q that belong to no request: 0 and -inf.
void clear_unowned(const PagedProblem& p) {
  const int64_t size = element_size(p.dtype);
  for (int64_t t = p.first_token(p.num_requests); t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < int64_t{p.num_kv_heads} * p.group; ++h) {
      std::memset(static_cast<char*>(p.out.data) + (t * p.out.token_stride + h * p.out.head_stride) * size, 0,
                  static_cast<size_t>(p.head_dim_v * size));
      p.lse[t * p.lse_token_stride + h * p.lse_head_stride] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

void paged_attention(const PagedProblem& problem, Threads& threads) {
  const Kernels& level = kernels();
  const int max_workers = threads.count();
  const Plan plan = make_plan(problem, max_workers);
  const int workers = kv_bytes(problem, plan) < kSerialBytes ? 1 : max_workers;

  if (explain::Notes* notes = explain::notes()) {
    explain_attention(*notes, problem, plan, workers, level.attention_scratch_bytes(problem, plan));
    return;
  }

  const int64_t out_stride = (problem.head_dim_v + 31) / 32 * 32;
  const Buffer partial_memory = allocate(plan.partial_rows * (out_stride + 2) * int64_t{sizeof(float)});
  Partials partials;
  partials.out = reinterpret_cast<float*>(partial_memory.get());
  partials.max = partials.out + plan.partial_rows * out_stride;
  partials.sum = partials.max + plan.partial_rows;
  partials.out_stride = out_stride;

  const int64_t scratch_bytes = (level.attention_scratch_bytes(problem, plan) + 63) / 64 * 64;
  const Buffer scratch = allocate(scratch_bytes * workers);

  // The worker that finishes a tile's last split merges them all, in their order.
  const auto open = std::make_unique<std::atomic<int32_t>[]>(plan.tiles.size());
  for (size_t i = 0; i < plan.tiles.size(); ++i) open[i] = plan.tiles[i].num_splits;

  parallel_items(threads, workers, static_cast<int64_t>(plan.items.size()), [&](int worker, int64_t i) {
    const Item item = plan.items[static_cast<size_t>(i)];
    level.attend(problem, plan, item, scratch.get() + worker * scratch_bytes, partials);
    const Tile& tile = plan.tiles[static_cast<size_t>(item.tile)];
    if (tile.num_splits > 1 && open[static_cast<size_t>(item.tile)].fetch_sub(1) == 1) {
      level.merge_splits(problem, tile, partials);
    }
  });
  clear_unowned(problem);
}

void append_kv(const AppendKvArgs& args, Threads& threads) {
  const Tensor& pages = args.k_pages;
  const int64_t page_size = pages.shape[1], num_heads = pages.shape[2];
  const int64_t* slots = args.slot_mapping.ptr<const int64_t>();
  const auto copy = [&](const Tensor& from, const Tensor& to, int64_t token, int64_t slot) {
    const int64_t size = element_size(from.dtype), bytes = from.shape[2] * size;
    const char* source = from.ptr<const char>() + token * from.stride[0] * size;
    char* target = to.ptr<char>() + (slot / page_size * to.stride[0] + slot % page_size * to.stride[1]) * size;
    if (from.stride[1] == from.shape[2] && to.stride[2] == from.shape[2]) {
      std::memcpy(target, source, static_cast<size_t>(num_heads * bytes));
      return;
    }
    for (int64_t h = 0; h < num_heads; ++h) {
      std::memcpy(target + h * to.stride[2] * size, source + h * from.stride[1] * size, static_cast<size_t>(bytes));
    }
  };
  const int64_t row_bytes = num_heads * (args.k.shape[2] + args.v.shape[2]) * element_size(args.k.dtype);
  parallel_ranges(threads, args.k.shape[0], kSerialBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = slots[t * args.slot_mapping.stride[0]];
      if (slot < 0) continue;
      copy(args.k, args.k_pages, t, slot);
      copy(args.v, args.v_pages, t, slot);
    }
  });
}

}  // namespace kvk::cpu
