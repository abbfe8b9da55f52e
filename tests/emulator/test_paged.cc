// Paged attention on CUDA: libkvk's own checks and launch code over the emulator, against two nested loops in double.
// Unused keys are NaN, unused table entries wild, outputs poisoned; lengths take every pipeline around several times.
#include "core/paged_check.h"
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"
#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_prefill_params.h"

namespace kvk {
namespace {

// nan_key: NaN in V of this key of request 0, which only later tokens may see.
// num_sms: 1 makes a block take several splits of its request, more share them among blocks. shared_per_block: of the card.
void run(const std::string& what, const test::Spec& spec, int64_t nan_key = -1, int num_sms = 4,
         int shared_per_block = static_cast<int>(emu::max_smem_bytes())) {
  test::Case c(spec, 7);
  if (nan_key >= 0) {
    const Tensor& v = c.args.v_pages;
    const int64_t page =
        test::naive_page(c.args.table, static_cast<int64_t>(spec.lens.size()), v.shape[2], 0, 0, nan_key / v.shape[1]);
    char* at = v.ptr<char>() + (page * v.stride[0] + nan_key % v.shape[1] * v.stride[1]) * element_size(v.dtype);
    const uint16_t nan = 0x7fff;
    std::memcpy(at + 2 * element_size(v.dtype), &nan, sizeof nan);
  }
  OnDevice device;
  PagedPrefillArgs on = c.args;
  put_on(device, on);
  on.k_pages = device(on.k_pages);
  on.v_pages = device(on.v_pages);

  emu::EmulatorLauncher launcher(num_sms, shared_per_block);
  emu::EmulatorWorkspace workspace;
  const PagedProblem problem =
      spec.is_decode() ? check_paged_decode({on.q, on.k_pages, on.v_pages, on.table, on.score, on.out, on.lse})
                       : check_paged_prefill(on);
  const Tensor& indices = on.table.page_indices;
  cuda::launch_paged_attention(problem, indices.shape[indices.ndim - 1], launcher, workspace);

  compare_results(on, c, spec, what);
}

using test::Spec;
using test::Table;

void decode_cases() {
  run("decode bf16 8/2 heads, 1 to 3 splits, an empty request", {.dtype = DType::bf16,
                                                                 .num_heads = 8,
                                                                 .num_kv_heads = 2,
                                                                 .head_dim = 128,
                                                                 .head_dim_v = 128,
                                                                 .lens = {0, 1, 77, 1300, 512, 513}});
  run("decode f16 7/1 heads, D 64 and 40, page 5, every option, CSR", {.dtype = DType::f16,
                                                                       .num_heads = 7,
                                                                       .num_kv_heads = 1,
                                                                       .head_dim = 64,
                                                                       .head_dim_v = 40,
                                                                       .page_size = 5,
                                                                       .lens = {3, 700, 0, 130},
                                                                       .table = Table::csr,
                                                                       .window_left = 600,
                                                                       .logits_soft_cap = 5,
                                                                       .alibi = true,
                                                                       .sinks = true,
                                                                       .key_bias = true});
  run("decode bf16 24/2 heads, D 72 and 96, lists per head, HND", {.dtype = DType::bf16,
                                                                   .num_heads = 24,
                                                                   .num_kv_heads = 2,
                                                                   .head_dim = 72,
                                                                   .head_dim_v = 96,
                                                                   .page_size = 7,
                                                                   .lens = {90, 530},
                                                                   .table = Table::per_head,
                                                                   .heads_first = true});
  run("decode f16 20/1 heads: two tiles of query heads, page 1, window", {.dtype = DType::f16,
                                                                          .num_heads = 20,
                                                                          .num_kv_heads = 1,
                                                                          .head_dim = 32,
                                                                          .head_dim_v = 32,
                                                                          .page_size = 1,
                                                                          .lens = {200, 1, 700},
                                                                          .window_left = 99});
}

// A block that takes several splits reuses its shared memory for each.
void several_splits_a_block() {
  run("decode bf16 8/2 heads, a block takes several splits",
      {.dtype = DType::bf16,
       .num_heads = 8,
       .num_kv_heads = 2,
       .head_dim = 128,
       .head_dim_v = 128,
       .lens = {1300, 0, 77, 1100, 600}},
      -1, 1);
}

void prefill_cases() {
  run("prefill bf16 4/2 heads: tiled and streamed requests, one without tokens, rows of no request",
      {.dtype = DType::bf16,
       .num_heads = 4,
       .num_kv_heads = 2,
       .head_dim = 64,
       .head_dim_v = 64,
       .lens = {100, 600, 200, 5, 330},
       .tokens = {100, 1, 3, 0, 140},
       .unowned_tokens = 3});
  run("prefill bf16, more tokens than keys, not causal next", {.dtype = DType::bf16,
                                                               .num_heads = 4,
                                                               .num_kv_heads = 2,
                                                               .head_dim = 64,
                                                               .head_dim_v = 64,
                                                               .lens = {10, 0},
                                                               .tokens = {40, 9}});
  run("prefill bf16 not causal, window, lists per head", {.dtype = DType::bf16,
                                                          .num_heads = 4,
                                                          .num_kv_heads = 2,
                                                          .head_dim = 64,
                                                          .head_dim_v = 64,
                                                          .lens = {150},
                                                          .tokens = {70},
                                                          .table = Table::csr_per_head,
                                                          .causal = false,
                                                          .window_left = 60});
  run("prefill f16, every option and tree masks, tiled and streamed", {.dtype = DType::f16,
                                                                       .num_heads = 6,
                                                                       .num_kv_heads = 2,
                                                                       .head_dim = 32,
                                                                       .head_dim_v = 48,
                                                                       .page_size = 3,
                                                                       .lens = {90, 70, 300},
                                                                       .tokens = {33, 5, 40},
                                                                       .window_left = 80,
                                                                       .logits_soft_cap = 3,
                                                                       .alibi = true,
                                                                       .sinks = true,
                                                                       .key_bias = true,
                                                                       .mask_bits = true});
  run("prefill bf16 D 160: one row tile a warp", {.dtype = DType::bf16,
                                                  .num_heads = 3,
                                                  .num_kv_heads = 1,
                                                  .head_dim = 160,
                                                  .head_dim_v = 160,
                                                  .lens = {230},
                                                  .tokens = {50}});
  const Spec causal = {.dtype = DType::bf16,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .head_dim = 64,
                       .head_dim_v = 64,
                       .lens = {80},
                       .tokens = {60}};
  run("prefill: a NaN value reaches only the rows that read it", causal, 50);
  Spec few = causal;
  few.tokens = {4};
  run("streamed: a NaN value reaches only the rows that read it", few, 78);
}

// Cards that give a block 99 KiB: fewer warps, rows or keys at a time for the same answer.
void small_card_cases() {
  const int shared = 99 * 1024;
  for (const int head_dim : {64, 128, 256}) {
    const bool small = head_dim > 64;
    for (const int halves : {1, 2}) {
      emu::expect(device::PagedDecodeShape(head_dim, head_dim, halves, small).shared_bytes() <= size_t{shared},
                  "decode of head dim " + std::to_string(head_dim) + " fits a small card");
    }
    emu::expect(device::PagedPrefillShape(head_dim, head_dim, small).shared_bytes() <= size_t{shared},
                "prefill of head dim " + std::to_string(head_dim) + " fits a small card");
  }
  Spec spec = {.dtype = DType::bf16,
               .num_heads = 4,
               .num_kv_heads = 2,
               .head_dim = 256,
               .head_dim_v = 256,
               .lens = {0, 600, 130}};
  run("small card: decode, two warps", spec, -1, 4, shared);
  spec.lens = {90, 300};
  spec.tokens = {70, 3};
  run("small card: D 256, prefill of 16 keys at a time, and a streamed request", spec, -1, 4, shared);
  spec.head_dim = spec.head_dim_v = 128;
  run("small card: D 128, prefill of one row tile a warp, and a streamed request", spec, -1, 4, shared);
}

}  // namespace
}  // namespace kvk

int main() {
  return kvk::emu::run_tests([] {
    kvk::decode_cases();
    kvk::several_splits_a_block();
    kvk::prefill_cases();
    kvk::small_card_cases();
  });
}
