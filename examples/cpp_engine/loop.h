// The decode loop: a batch of requests that begin one after another, one attention layer. Every step appends a key and a value per
// request, packs pages that are full into records, and attends over records and dense pages in one call. At the end the last step
// is computed again in double from all keys and values ever appended.
//
// Where the arrays lie is the caller's: main.cc has them on the CPU, cuda.cc on a card.
#pragma once

#include <kvk/kvk.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "cache.h"
#include "step.h"

namespace engine {

// A bfloat16 that converts, rounding to nearest even. The normal numbers of this example alone come here.
struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  BFloat16(float x) {
    const auto all = std::bit_cast<uint32_t>(x);
    bits = static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

template <class T>
inline constexpr kvk::DType kDType = kvk::DType::f32;
template <>
inline constexpr kvk::DType kDType<BFloat16> = kvk::DType::bf16;

struct Setup {
  int64_t num_q_heads, num_kv_heads;
  kvk::QuantFormat format;
  int32_t num_requests;
  int num_steps, join_every;  // a request begins every so many steps
};

// Pages of 32 tokens, heads of 64 channels; 8 bits, in groups of 32 along tokens for K and along channels for V.
inline constexpr Setup kSetup = {8, 2, {32, 64, 64, {8, 32, true, 0}, {8, 32, false, 0}}, 4, 200, 45};

// The attention of one request's query head over its keys from the step that it began at, in double.
template <class T>
std::vector<double> exact(const Setup& setup, const std::vector<T>& q, const std::vector<std::vector<T>>& keys,
                          const std::vector<std::vector<T>>& values, int64_t request, int64_t head) {
  const auto dim = static_cast<size_t>(setup.format.head_dim);
  const int64_t kv_head = head / (setup.num_q_heads / setup.num_kv_heads);
  const size_t kv_at = static_cast<size_t>(request * setup.num_kv_heads + kv_head) * dim;
  const size_t q_at = static_cast<size_t>(request * setup.num_q_heads + head) * dim;
  std::vector<double> out(dim);
  double total = 0;
  for (auto t = static_cast<size_t>(request * setup.join_every); t < keys.size(); ++t) {
    double score = 0;
    for (size_t i = 0; i < dim; ++i) score += double{float{q[q_at + i]}} * double{float{keys[t][kv_at + i]}};
    const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
    total += weight;
    for (size_t i = 0; i < dim; ++i) out[i] += weight * double{float{values[t][kv_at + i]}};
  }
  for (double& x : out) x /= total;
  return out;
}

// The largest error of the last step. Array<T>(values, written) is memory of the device that begins as `values`, and that a call
// only reads unless it is `written`; data() is its start there, host() what it holds.
template <class T, template <class> class Array>
double decode_loop(const Setup& setup, kvk::Device device, const kvk::Context& context) {
  const kvk::QuantFormat& format = setup.format;
  const int64_t dim = format.head_dim, page_size = format.page_size, batch = setup.num_requests;
  const int64_t heads = setup.num_kv_heads;
  const int32_t num_dense = 2 * setup.num_requests;
  const int32_t num_records = setup.num_requests * (setup.num_steps / static_cast<int32_t>(page_size) + 1);
  const int64_t k_bytes = format.k_layout().record_bytes, v_bytes = format.v_layout().record_bytes;

  const auto filled = [](int64_t count, auto value) {
    return std::vector<decltype(value)>(static_cast<size_t>(count), value);
  };
  const T nan = std::numeric_limits<float>::quiet_NaN();  // pages begin as whatever memory holds
  const Array<T> k_pages(filled(num_dense * page_size * heads * dim, nan), true);
  const Array<T> v_pages(filled(num_dense * page_size * heads * dim, nan), true);
  const Array<uint8_t> k_pool(filled(num_records * heads * k_bytes, uint8_t{0xff}), true);
  const Array<uint8_t> v_pool(filled(num_records * heads * v_bytes, uint8_t{0xff}), true);
  const Layer layer = {view(k_pages.data(), kDType<T>, device, {num_dense, page_size, heads, dim}),
                       view(v_pages.data(), kDType<T>, device, {num_dense, page_size, heads, dim}),
                       view(k_pool.data(), kvk::DType::u8, device, {num_records, heads, k_bytes}),
                       view(v_pool.data(), kvk::DType::u8, device, {num_records, heads, v_bytes}), format};

  // What a model would compute of the last token.
  std::mt19937 random{0};
  std::normal_distribution<float> normal;
  const auto rows = [&](int64_t num_heads) {
    std::vector<T> x(static_cast<size_t>(batch * num_heads * dim));
    std::generate(x.begin(), x.end(), [&] { return normal(random); });
    return x;
  };

  PageTables tables(page_size, setup.num_requests, num_dense, num_records);
  std::vector<std::vector<T>> all_k, all_v;
  std::vector<T> last_q, last_out;
  for (int step = 0; step < setup.num_steps; ++step) {
    last_q = rows(setup.num_q_heads);
    all_k.push_back(rows(heads));
    all_v.push_back(rows(heads));
    const Array<T> q(last_q, false), k(all_k.back(), false), v(all_v.back(), false);
    const Array<T> out(filled(batch * setup.num_q_heads * dim, nan), true);
    const Array<float> lse(filled(batch * setup.num_q_heads, 0.0f), true);

    const auto running = static_cast<size_t>(std::min<int64_t>(batch, step / setup.join_every + 1));
    const Array<int64_t> slots(tables.next_slots(running), false);
    const PageTables::Full full = tables.pack_full_pages();
    const auto count = static_cast<int64_t>(full.from.size());
    const Array<int32_t> from(full.from, false), to(full.to, false);
    std::optional<Packing> packing;
    if (count > 0)
      packing = {view(from.data(), kvk::DType::i32, device, {count}),
                 view(to.data(), kvk::DType::i32, device, {count})};
    const auto max_pages = static_cast<int64_t>(tables.max_pages());
    const Array<int32_t> table(tables.table(), false), lens(tables.lens(), false);
    run_step(layer,
             {.q = view(q.data(), kDType<T>, device, {batch, setup.num_q_heads, dim}),
              .k = view(k.data(), kDType<T>, device, {batch, heads, dim}),
              .v = view(v.data(), kDType<T>, device, {batch, heads, dim}),
              .slots = view(slots.data(), kvk::DType::i64, device, {batch}),
              .packing = packing,
              .table = view(table.data(), kvk::DType::i32, device, {batch, max_pages}),
              .lens = view(lens.data(), kvk::DType::i32, device, {batch}),
              .out = view(out.data(), kDType<T>, device, {batch, setup.num_q_heads, dim}),
              .lse = view(lse.data(), kvk::DType::f32, device, {batch, setup.num_q_heads})},
             context);
    tables.packed(full.from);
    last_out = out.host();
  }

  double worst = 0;
  for (int64_t row = 0; row < batch * setup.num_q_heads; ++row) {
    const std::vector<double> want =
        exact(setup, last_q, all_k, all_v, row / setup.num_q_heads, row % setup.num_q_heads);
    for (size_t i = 0; i < want.size(); ++i) {
      const double error = std::abs(double{float{last_out[static_cast<size_t>(row * dim) + i]}} - want[i]);
      worst = error <= worst ? worst : error;  // a NaN stays
    }
  }
  return worst;
}

// Bits for each element of a full page.
inline double bits_per_element(const kvk::QuantFormat& format) {
  const int64_t bytes = format.k_layout().record_bytes + format.v_layout().record_bytes;
  return 8.0 * static_cast<double>(bytes) / static_cast<double>(2 * format.page_size * format.head_dim);
}

}  // namespace engine
