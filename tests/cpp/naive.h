// Paged attention by two nested loops in double precision, from the definitions in docs/conventions.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "testing.h"

namespace test {

struct Row {
  std::vector<double> out;
  double lse = -kInf;
};

// Number of keys of a (request, kv head).
inline int64_t naive_len(const kvk::PageTable& table, int64_t b, int64_t kv_head) {
  return static_cast<int64_t>(table.kv_lens.ndim == 1 ? element(table.kv_lens, {b})
                                                      : element(table.kv_lens, {b, kv_head}));
}

// Page number i of the list of a (request, kv head).
inline int64_t naive_page(const kvk::PageTable& table, int64_t num_requests, int64_t num_kv_heads, int64_t b,
                          int64_t kv_head, int64_t i) {
  if (table.page_indptr) {
    const bool per_head = table.page_indptr->shape[0] != num_requests + 1;
    const int64_t row = per_head ? b * num_kv_heads + kv_head : b;
    const int64_t start = static_cast<int64_t>(element(*table.page_indptr, {row}));
    return static_cast<int64_t>(element(table.page_indices, {start + i}));
  }
  if (table.page_indices.ndim == 3) return static_cast<int64_t>(element(table.page_indices, {b, kv_head, i}));
  return static_cast<int64_t>(element(table.page_indices, {b, i}));
}

// Query head h of token i of the n of request b, whose rows of q start at `start`.
inline Row naive_row(const kvk::PagedPrefillArgs& a, int64_t b, int64_t start, int64_t i, int64_t n, int64_t h) {
  const int64_t num_requests = a.qo_indptr.shape[0] - 1, page_size = a.k_pages.shape[1];
  const int64_t num_kv_heads = a.k_pages.shape[2], head_dim = a.q.shape[2], head_dim_v = a.v_pages.shape[3];
  const int64_t kv_head = h / (a.q.shape[1] / num_kv_heads), token = start + i;
  const int64_t len = naive_len(a.table, b, kv_head), query = len - n + i;
  const int64_t mask_width = a.mask_width < 0 ? n : a.mask_width;
  const kvk::ScoreOptions& o = a.score;
  const double scale = o.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)));

  struct Key {
    int64_t page, offset;
    double score;
  };
  std::vector<Key> keys;
  double max = -kInf;
  for (int64_t j = 0; j < len; ++j) {
    if (a.causal && j > query) continue;
    if (o.window_left >= 0 && j < query - o.window_left) continue;
    if (a.mask_bits && j >= len - mask_width) {
      const int64_t bit = j - (len - mask_width);
      const uint32_t word = static_cast<uint32_t>(static_cast<int64_t>(element(*a.mask_bits, {token, bit / 32})));
      if (!(word >> bit % 32 & 1)) continue;
    }
    const int64_t page = naive_page(a.table, num_requests, num_kv_heads, b, kv_head, j / page_size);
    const int64_t offset = j % page_size;
    double s = 0;
    for (int64_t d = 0; d < head_dim; ++d) {
      s += element(a.q, {token, h, d}) * element(a.k_pages, {page, offset, kv_head, d});
    }
    s *= scale;
    if (o.logits_soft_cap > 0) s = o.logits_soft_cap * std::tanh(s / o.logits_soft_cap);
    if (o.alibi_slopes) s -= element(*o.alibi_slopes, {h}) * static_cast<double>(std::abs(query - j));
    if (o.key_bias) {
      s += o.key_bias->ndim == 3 ? element(*o.key_bias, {page, offset, kv_head}) : element(*o.key_bias, {page, offset});
    }
    if (s == -kInf) continue;
    max = std::max(max, s);
    keys.push_back({page, offset, s});
  }

  Row row{std::vector<double>(static_cast<size_t>(head_dim_v), 0.0), -kInf};
  if (keys.empty()) return row;
  if (o.sinks) max = std::max(max, element(*o.sinks, {h}));
  double sum = o.sinks ? std::exp(element(*o.sinks, {h}) - max) : 0.0;
  for (const Key& key : keys) sum += std::exp(key.score - max);
  for (const Key& key : keys) {
    const double weight = std::exp(key.score - max) / sum;
    for (int64_t d = 0; d < head_dim_v; ++d) {
      row.out[static_cast<size_t>(d)] += weight * element(a.v_pages, {key.page, key.offset, kv_head, d});
    }
  }
  row.lse = max + std::log(sum);
  return row;
}

// Compares all of out and lse with the naive result, rows of no request included.
inline void check_attention(const kvk::PagedPrefillArgs& a, const std::string& what) {
  const int64_t num_tokens = a.q.shape[0], num_heads = a.q.shape[1], num_requests = a.qo_indptr.shape[0] - 1;
  const auto compare = [&](int64_t token, int64_t h, const Row& want) {
    const std::string row = what + ": token " + std::to_string(token) + " head " + std::to_string(h);
    check_near(element(a.lse, {token, h}), want.lse, 1e-5 * (1 + std::abs(want.lse)), row + " lse");
    const std::string out = row + " out";
    for (size_t d = 0; d < want.out.size(); ++d) {
      const double tolerance = 1e-5 + 1.01 * rounding(a.out.dtype) * std::abs(want.out[d]);
      check_near(element(a.out, {token, h, static_cast<int64_t>(d)}), want.out[d], tolerance, out);
    }
  };
  int64_t owned = 0;
  for (int64_t b = 0; b < num_requests; ++b) {
    const int64_t start = static_cast<int64_t>(element(a.qo_indptr, {b}));
    owned = static_cast<int64_t>(element(a.qo_indptr, {b + 1}));
    for (int64_t i = 0; i < owned - start; ++i) {
      for (int64_t h = 0; h < num_heads; ++h) compare(start + i, h, naive_row(a, b, start, i, owned - start, h));
    }
  }
  const Row none{std::vector<double>(static_cast<size_t>(a.v_pages.shape[3]), 0.0), -kInf};
  for (int64_t token = owned; token < num_tokens; ++token) {
    for (int64_t h = 0; h < num_heads; ++h) compare(token, h, none);
  }
}

// A decode is a prefill of one token a request.
inline void check_attention(const kvk::PagedDecodeArgs& a, const std::string& what) {
  std::vector<int32_t> starts(static_cast<size_t>(a.q.shape[0] + 1));
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int32_t>(i);
  const Array qo_indptr = Array::of(starts);
  kvk::PagedPrefillArgs prefill;
  prefill.q = a.q;
  prefill.qo_indptr = qo_indptr.view();
  prefill.k_pages = a.k_pages;
  prefill.v_pages = a.v_pages;
  prefill.table = a.table;
  prefill.score = a.score;
  prefill.out = a.out;
  prefill.lse = a.lse;
  check_attention(prefill, what);
}

}  // namespace test
