// A decode loop with nothing but kvk's C++ face: a batch of requests that begin one after another, one attention layer; every step appends a key and a value
// per request, packs pages that are full into 8-bit records, and attends over records and dense pages in one call. At the end
// the last step is computed again in double from all keys and values ever appended, and the two are compared.
//
// KVK_LOG=1 and KVK_DUMP=FOLDER show what it calls (docs/record.md).
#include <kvk/kvk.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <random>
#include <vector>

#include "cache.h"
#include "step.h"

namespace {

using engine::view;
using Floats = std::vector<float>;

constexpr engine::Shape kShape = {8, 2, 64, 32, kvk::DType::f32};
constexpr int32_t kRequests = 4;
constexpr int kSteps = 200;
constexpr int kJoin = 45;  // a request begins every so many steps

// What a model would compute of the last token.
struct Model {
  std::mt19937 random{0};
  std::normal_distribution<float> normal;
  Floats rows(int64_t heads) {
    Floats x(static_cast<size_t>(kRequests * heads * kShape.head_dim));
    std::generate(x.begin(), x.end(), [&] { return normal(random); });
    return x;
  }
};

// The attention of one request's query head over its keys from the step that it began at, in double.
std::vector<double> exact(const Floats& q, const std::vector<Floats>& keys, const std::vector<Floats>& values,
                          int request, int head) {
  const int64_t dim = kShape.head_dim, kv_head = head / (kShape.num_q_heads / kShape.num_kv_heads);
  const size_t kv_at = static_cast<size_t>((request * kShape.num_kv_heads + kv_head) * dim);
  const size_t q_at = static_cast<size_t>((request * kShape.num_q_heads + head) * dim);
  std::vector<double> out(static_cast<size_t>(dim));
  double total = 0;
  for (size_t t = static_cast<size_t>(request * kJoin); t < keys.size(); ++t) {
    double score = 0;
    for (size_t i = 0; i < out.size(); ++i) score += double{q[q_at + i]} * double{keys[t][kv_at + i]};
    const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
    total += weight;
    for (size_t i = 0; i < out.size(); ++i) out[i] += weight * double{values[t][kv_at + i]};
  }
  for (double& x : out) x /= total;
  return out;
}

}  // namespace

int main() {
  const kvk::Device cpu;
  const auto [num_q_heads, num_kv_heads, dim, page_size, dtype] = kShape;
  const kvk::QuantPart part = {8, 32, true, 0}, part_v = {8, 32, false, 0};  // bits, group, along tokens, rotate
  const kvk::QuantFormat format = {page_size, dim, dim, part, part_v};
  const int32_t num_dense = 2 * kRequests, num_records = kRequests * (kSteps / 32 + 1);

  Floats k_pages(static_cast<size_t>(num_dense * page_size * num_kv_heads * dim)), v_pages(k_pages.size());
  const int64_t k_bytes = format.k_layout().record_bytes, v_bytes = format.v_layout().record_bytes;
  std::vector<uint8_t> k_pool(static_cast<size_t>(num_records * num_kv_heads * k_bytes));
  std::vector<uint8_t> v_pool(static_cast<size_t>(num_records * num_kv_heads * v_bytes));
  const engine::Layer layer = {
      view(k_pages.data(), dtype, cpu, {num_dense, page_size, num_kv_heads, dim}),
      view(v_pages.data(), dtype, cpu, {num_dense, page_size, num_kv_heads, dim}),
      engine::Records{view(k_pool.data(), kvk::DType::u8, cpu, {num_records, num_kv_heads, k_bytes}),
                      view(v_pool.data(), kvk::DType::u8, cpu, {num_records, num_kv_heads, v_bytes}), format}};

  engine::PageTables tables(kShape, kRequests, num_dense, num_records);
  Model model;
  std::vector<Floats> all_k, all_v;
  Floats q, out(static_cast<size_t>(kRequests * num_q_heads * dim)), lse(static_cast<size_t>(kRequests * num_q_heads));
  for (int step = 0; step < kSteps; ++step) {
    q = model.rows(num_q_heads);
    all_k.push_back(model.rows(num_kv_heads));
    all_v.push_back(model.rows(num_kv_heads));

    std::vector<int64_t> slots = tables.next_slots(static_cast<size_t>(std::min(kRequests, step / kJoin + 1)));
    auto [from, to] = tables.pack_full_pages();
    const auto count = static_cast<int64_t>(from.size());
    std::optional<engine::Packing> packing;
    if (count > 0)
      packing = {view(from.data(), kvk::DType::i32, cpu, {count}), view(to.data(), kvk::DType::i32, cpu, {count})};
    std::vector<int32_t> table = tables.table(), lens = tables.lens();
    const auto max_pages = static_cast<int64_t>(tables.max_pages());
    engine::run_step(layer, {.q = view(q.data(), dtype, cpu, {kRequests, num_q_heads, dim}),
                             .k = view(all_k.back().data(), dtype, cpu, {kRequests, num_kv_heads, dim}),
                             .v = view(all_v.back().data(), dtype, cpu, {kRequests, num_kv_heads, dim}),
                             .slots = view(slots.data(), kvk::DType::i64, cpu, {kRequests}),
                             .packing = packing,
                             .table = view(table.data(), kvk::DType::i32, cpu, {kRequests, max_pages}),
                             .lens = view(lens.data(), kvk::DType::i32, cpu, {kRequests}),
                             .out = view(out.data(), dtype, cpu, {kRequests, num_q_heads, dim}),
                             .lse = view(lse.data(), kvk::DType::f32, cpu, {kRequests, num_q_heads})});
    tables.packed(from);
  }

  double worst = 0;
  for (int request = 0; request < kRequests; ++request) {
    for (int head = 0; head < num_q_heads; ++head) {
      const std::vector<double> want = exact(q, all_k, all_v, request, head);
      const float* got = out.data() + (request * num_q_heads + head) * dim;
      for (size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::abs(double{got[i]} - want[i]));
    }
  }
  const double bits = 8.0 * static_cast<double>(k_bytes + v_bytes) / static_cast<double>(2 * page_size * dim);
  std::printf("%d steps of %d requests at %s: %.1f bits an element in full pages, largest error %.1e\n", kSteps,
              kRequests, kvk::cpu_level(), bits, worst);
  return worst < 5e-3 ? 0 : 1;
}
