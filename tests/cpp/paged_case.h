// One random problem of paged attention: a pool whose unused keys are NaN, pages in random order, any form of table.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "naive.h"

namespace test {

enum class Table { dense, per_head, csr, csr_per_head };

struct Spec {
  kvk::DType dtype = kvk::DType::f32;
  int64_t num_heads = 4, num_kv_heads = 2, head_dim = 64, head_dim_v = 64, page_size = 16;
  std::vector<int64_t> lens = {};    // keys of each request
  std::vector<int64_t> tokens = {};  // query tokens of each request; empty: one each, a decode
  int64_t unowned_tokens = 0;        // rows of q behind the last request's
  Table table = Table::dense;
  bool heads_first = false;  // pages stored [N, Hkv, P, D]
  bool causal = true;
  int64_t window_left = -1;
  double logits_soft_cap = 0;
  bool alibi = false, sinks = false, key_bias = false, mask_bits = false;
  int64_t mask_width = -1;

  bool is_decode() const { return tokens.empty(); }
};

class Case {
 public:
  Case(const Spec& spec, uint64_t seed) : spec_(spec), random_(seed) {
    const int64_t num_requests = static_cast<int64_t>(spec.lens.size());
    int64_t num_tokens = num_requests, num_pages = 3;
    std::vector<int32_t> starts{0};
    if (!spec.is_decode()) {
      for (const int64_t n : spec.tokens) starts.push_back(starts.back() + static_cast<int32_t>(n));
      num_tokens = starts.back() + spec.unowned_tokens;
    }
    const bool per_head = spec.table == Table::per_head || spec.table == Table::csr_per_head;
    for (const int64_t len : spec.lens) num_pages += pages_of(len) * (per_head ? spec.num_kv_heads : 1);

    args.q = keep(Array::random(spec.dtype, {num_tokens, spec.num_heads, spec.head_dim}, random_));
    args.qo_indptr = keep(Array::of(starts));
    args.k_pages = pool(num_pages, spec.head_dim);
    args.v_pages = pool(num_pages, spec.head_dim_v);
    make_table(num_pages, per_head);
    make_score(num_pages);
    args.causal = spec.causal;
    if (spec.mask_bits) make_mask(num_tokens);
    args.out = keep(poisoned(spec.dtype, {num_tokens, spec.num_heads, spec.head_dim_v}));
    args.lse = keep(poisoned(kvk::DType::f32, {num_tokens, spec.num_heads}));
  }

  void run(kvk::Threads& threads = kvk::default_threads()) {
    if (spec_.is_decode()) {
      kvk::paged_decode(decode_args(), threads);
    } else {
      kvk::paged_prefill(args, threads);
    }
  }

  void check(const std::string& what) const {
    if (spec_.is_decode()) {
      check_attention(decode_args(), what);
    } else {
      check_attention(args, what);
    }
  }

  kvk::PagedDecodeArgs decode_args() const {
    return {args.q, args.k_pages, args.v_pages, args.table, args.score, args.out, args.lse};
  }

  // out and then lse, byte for byte
  std::vector<unsigned char> result() const {
    std::vector<unsigned char> bytes;
    for (const kvk::Tensor* t : {&args.out, &args.lse}) {
      const auto* p = t->ptr<const unsigned char>();
      bytes.insert(bytes.end(), p, p + t->numel() * kvk::element_size(t->dtype));
    }
    return bytes;
  }

  kvk::PagedPrefillArgs args;

 private:
  int64_t pages_of(int64_t len) const { return (len + spec_.page_size - 1) / spec_.page_size; }

  const kvk::Tensor& keep(Array array) {
    arrays_.push_back(std::make_unique<Array>(std::move(array)));
    return arrays_.back()->view();
  }

  static Array poisoned(kvk::DType dtype, std::initializer_list<int64_t> shape) {
    Array a(dtype, shape);
    a.poison();
    return a;
  }

  // All NaN; make_table fills the keys that some request has.
  kvk::Tensor pool(int64_t num_pages, int64_t head_dim) {
    const int64_t P = spec_.page_size, H = spec_.num_kv_heads;
    if (!spec_.heads_first) return keep(poisoned(spec_.dtype, {num_pages, P, H, head_dim}));
    return swap_tokens_and_heads(keep(poisoned(spec_.dtype, {num_pages, H, P, head_dim})));
  }

  void fill_key(const kvk::Tensor& pages, int64_t page, int64_t offset, int64_t kv_head) {
    Array row = Array::random(spec_.dtype, {pages.shape[3]}, random_);
    char* to = pages.ptr<char>();
    to += (page * pages.stride[0] + offset * pages.stride[1] + kv_head * pages.stride[2]) *
          kvk::element_size(pages.dtype);
    std::memcpy(to, row.view().data, row.bytes());
  }

  void make_table(int64_t num_pages, bool per_head) {
    std::vector<int32_t> free(static_cast<size_t>(num_pages));
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int32_t>(i);
    for (size_t i = free.size(); i > 1; --i)
      std::swap(free[i - 1], free[static_cast<size_t>(random_.below(static_cast<int64_t>(i)))]);

    const int64_t num_requests = static_cast<int64_t>(spec_.lens.size()), H = spec_.num_kv_heads;
    const int64_t lists = per_head ? H : 1;
    int64_t max_pages = 1;
    for (const int64_t len : spec_.lens) max_pages = std::max(max_pages, pages_of(len));
    std::vector<int32_t> dense, flat, indptr{0}, lens;
    for (int64_t b = 0; b < num_requests; ++b) {
      const int64_t len = spec_.lens[static_cast<size_t>(b)];
      for (int64_t list = 0; list < lists; ++list) {
        // A head with its own pages has its own length too, now and then.
        const int64_t own = per_head && len > 0 && list > 0 ? len - random_.below(std::min<int64_t>(len, 5)) : len;
        lens.push_back(static_cast<int32_t>(own));
        for (int64_t i = 0; i < max_pages; ++i) {
          if (i >= pages_of(own)) {
            dense.push_back(i % 2 ? -1 : 1 << 30);  // never read
            continue;
          }
          const int32_t page = free.back();
          free.pop_back();
          dense.push_back(page);
          flat.push_back(page);
          for (int64_t offset = 0; offset < std::min(spec_.page_size, own - i * spec_.page_size); ++offset) {
            for (int64_t h = per_head ? list : 0; h < (per_head ? list + 1 : H); ++h) {
              fill_key(args.k_pages, page, offset, h);
              fill_key(args.v_pages, page, offset, h);
            }
          }
        }
        indptr.push_back(static_cast<int32_t>(flat.size()));
      }
    }
    args.table.kv_lens = keep(Array::of(lens));
    if (per_head) args.table.kv_lens = reshaped(args.table.kv_lens, {num_requests, H});
    if (spec_.table == Table::csr || spec_.table == Table::csr_per_head) {
      args.table.page_indices = keep(Array::of(flat));
      args.table.page_indptr = keep(Array::of(indptr));
    } else {
      args.table.page_indices = keep(Array::of(dense));
      args.table.page_indices = per_head ? reshaped(args.table.page_indices, {num_requests, H, max_pages})
                                         : reshaped(args.table.page_indices, {num_requests, max_pages});
    }
  }

  static kvk::Tensor reshaped(kvk::Tensor t, std::initializer_list<int64_t> shape) {
    t.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), t.shape);
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.stride[i] = stride;
      stride *= t.shape[i];
    }
    return t;
  }

  void make_score(int64_t num_pages) {
    kvk::ScoreOptions& score = args.score;
    score.window_left = spec_.window_left;
    score.logits_soft_cap = spec_.logits_soft_cap;
    if (spec_.alibi) score.alibi_slopes = keep(Array::random(kvk::DType::f32, {spec_.num_heads}, random_, 0.1f));
    if (spec_.sinks) score.sinks = keep(Array::random(kvk::DType::f32, {spec_.num_heads}, random_, 2.0f));
    if (spec_.key_bias) {
      Array bias = Array::random(kvk::DType::f32, {num_pages, spec_.page_size, spec_.num_kv_heads}, random_, 2.0f);
      // Every seventh key is hidden by its bias.
      for (int64_t i = 0; i < bias.view().numel(); i += 7) bias.set(i, -std::numeric_limits<float>::infinity());
      score.key_bias = keep(std::move(bias));
    }
  }

  void make_mask(int64_t num_tokens) {
    int64_t width = spec_.mask_width;
    for (const int64_t n : spec_.tokens) width = std::max(width, spec_.mask_width < 0 ? n : width);
    Array bits(kvk::DType::i32, {num_tokens, (width + 31) / 32});
    for (int64_t i = 0; i < bits.view().numel(); ++i) {
      bits.view().ptr<uint32_t>()[i] = static_cast<uint32_t>(random_.bits() | random_.bits());
    }
    args.mask_bits = keep(std::move(bits));
    args.mask_width = spec_.mask_width;
  }

  Spec spec_;
  Random random_;
  std::vector<std::unique_ptr<Array>> arrays_;
};

}  // namespace test
