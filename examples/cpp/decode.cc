// One decode step over a paged cache: one request with 3 keys in pages of 2 tokens, 2 query heads on 1 kv head.
#include <kvk/kvk.h>

#include <cstdio>
#include <vector>

int main() {
  std::vector<float> q(2 * 32, 1.0f), k(2 * 2 * 32, 1.0f), v(2 * 2 * 32, 0.5f), out(2 * 32), lse(2);
  std::vector<int32_t> pages = {1, 0}, lens = {3};
  const auto f32 = kvk::DType::f32, i32 = kvk::DType::i32;
  const kvk::Device cpu;
  kvk::paged_decode({.q = {q.data(), f32, cpu, 3, {1, 2, 32}, {64, 32, 1}},
                     .k_pages = {k.data(), f32, cpu, 4, {2, 2, 1, 32}, {64, 32, 32, 1}},
                     .v_pages = {v.data(), f32, cpu, 4, {2, 2, 1, 32}, {64, 32, 32, 1}},
                     .table = {{pages.data(), i32, cpu, 2, {1, 2}, {2, 1}}, {}, {lens.data(), i32, cpu, 1, {1}, {1}}},
                     .score = {},
                     .out = {out.data(), f32, cpu, 3, {1, 2, 32}, {64, 32, 1}},
                     .lse = {lse.data(), f32, cpu, 2, {1, 2}, {2, 1}}});
  std::printf("kvk %s, %s: out %g, lse %.4f\n", kvk::version(), kvk::cpu_level(), out[0], lse[0]);
}
