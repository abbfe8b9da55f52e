// paged_decode, paged_prefill and append_kv against the naive loops: every dtype, head ratio, table and option.
// `quick` leaves out what takes long under emulation.
#include <string>

#include "paged_case.h"

namespace {

using namespace test;
using kvk::DType;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};

void run(const Spec& spec, uint64_t seed, const std::string& what) {
  Case problem(spec, seed);
  problem.run();
  problem.check(what + " " + name(spec.dtype));
}

// The head ratios of real models, and head dims that fill vectors, half of one, and unlike ones for K and V.
void shapes(bool quick) {
  const std::pair<int64_t, int64_t> heads[] = {{1, 1}, {8, 2}, {9, 3}, {5, 1}, {12, 2}, {7, 7}, {40, 2}};
  const std::pair<int64_t, int64_t> dims[] = {{64, 64}, {128, 128}, {40, 72}, {256, 32}, {32, 256}, {104, 136}};
  uint64_t seed = 100;
  for (const auto& [num_heads, num_kv_heads] : heads) {
    for (const auto& [head_dim, head_dim_v] : dims) {
      for (const DType dtype : kDTypes) {
        ++seed;
        if (quick && seed % 5) continue;
        Spec spec{.dtype = dtype, .num_heads = num_heads, .num_kv_heads = num_kv_heads, .head_dim = head_dim};
        spec.head_dim_v = head_dim_v;
        spec.page_size = 1 + static_cast<int64_t>(seed % 19);
        spec.table = static_cast<Table>(seed % 4);
        spec.heads_first = seed % 3 == 0;
        spec.lens = {70, 0, 1, 33};
        run(spec, seed, "decode shapes");
        spec.tokens = {3, 0, 2, 33};
        spec.unowned_tokens = 2;
        run(spec, seed, "prefill shapes");
      }
    }
  }
}

void options(bool quick) {
  for (uint64_t seed = 0; seed < 256; ++seed) {
    if (quick && seed % 8 != 5) continue;
    Spec spec{.dtype = kDTypes[seed % 3], .num_heads = 6, .num_kv_heads = 2, .head_dim = 64, .head_dim_v = 48};
    spec.page_size = 5;
    spec.table = static_cast<Table>(seed % 4);
    spec.window_left = seed & 1 ? static_cast<int64_t>(seed % 23) : -1;
    spec.logits_soft_cap = seed & 2 ? 0.7 : 0;
    spec.alibi = seed & 4;
    spec.sinks = seed & 8;
    spec.key_bias = seed & 16;
    spec.lens = {41, 3, 0, 67};
    run(spec, seed, "decode options " + std::to_string(seed));
    spec.causal = !(seed & 32);
    spec.mask_bits = seed & 64;
    spec.mask_width = spec.mask_bits && seed & 128 ? 37 : -1;
    spec.tokens = {9, 5, 2, 35};
    run(spec, seed, "prefill options " + std::to_string(seed));
  }
}

// Several splits of keys, and tiles of many query rows.
void long_requests(bool quick) {
  for (const DType dtype : kDTypes) {
    if (quick && dtype == DType::f16) continue;
    Spec spec{.dtype = dtype, .num_heads = 2, .num_kv_heads = 1, .head_dim = 32, .head_dim_v = 32, .page_size = 16};
    spec.lens = {1300, 512, quick ? 1 : 2049};
    run(spec, 1, "long decode");
    spec.lens = {300, quick ? 40 : 5000};
    spec.tokens = {130, quick ? 40 : 70};
    run(spec, 2, "long prefill");
    spec.window_left = 100;
    run(spec, 3, "long prefill with a window");
  }
}

void append(DType dtype, bool heads_first) {
  const int64_t num_pages = 4, page_size = 3, num_heads = 2, head_dim = 40, head_dim_v = 32, num_tokens = 6;
  Random random(7);
  const Array k = Array::random(dtype, {num_tokens, num_heads, head_dim}, random);
  const Array v = Array::random(dtype, {num_tokens, num_heads, head_dim_v}, random);
  const int64_t P = heads_first ? num_heads : page_size, H = heads_first ? page_size : num_heads;
  Array k_memory(dtype, {num_pages, P, H, head_dim}), v_memory(dtype, {num_pages, P, H, head_dim_v});
  const auto pages = [&](const Array& a) { return heads_first ? swap_tokens_and_heads(a.view()) : a.view(); };
  const std::vector<int64_t> slots = {11, -1, 0, 4, -9, 5};
  Array mapping(DType::i64, {num_tokens});
  std::memcpy(mapping.view().data, slots.data(), mapping.bytes());
  kvk::append_kv({k.view(), v.view(), pages(k_memory), pages(v_memory), mapping.view()});

  for (int64_t slot = 0; slot < num_pages * page_size; ++slot) {
    const auto token = std::find(slots.begin(), slots.end(), slot) - slots.begin();
    for (int64_t h = 0; h < num_heads; ++h) {
      for (const auto& [from, to] : {std::pair(k.view(), pages(k_memory)), std::pair(v.view(), pages(v_memory))}) {
        for (int64_t d = 0; d < to.shape[3]; ++d) {
          const double want = token < num_tokens ? element(from, {token, h, d}) : 0.0;
          check_equal(element(to, {slot / page_size, slot % page_size, h, d}), want,
                      "append slot " + std::to_string(slot) + " " + name(dtype));
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  return run([quick] {
    shapes(quick);
    options(quick);
    long_requests(quick);
    for (const DType dtype : kDTypes) {
      append(dtype, false);
      append(dtype, true);
    }
  });
}
