#include "core/paged_check.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"

namespace kvk {
namespace {

constexpr int64_t kMaxLen = int64_t{1} << 31;  // lengths are int32

struct PoolShape {
  int64_t num_pages, page_size, num_kv_heads, head_dim, head_dim_v;
};

PoolShape check_pools(const ArgChecker& check, const Tensor& k_pages, const Tensor& v_pages, DType dtype) {
  check.tensor(k_pages, "k_pages", dtype, {{"N"}, {"P"}, {"Hkv"}, {"D"}});
  const PoolShape pool = {k_pages.shape[0], k_pages.shape[1], k_pages.shape[2], k_pages.shape[3],
                          v_pages.ndim == 4 ? v_pages.shape[3] : 0};
  check.tensor(v_pages, "v_pages", dtype,
               {{"N", pool.num_pages}, {"P", pool.page_size}, {"Hkv", pool.num_kv_heads}, {"Dv"}});
  check.head_dim(pool.head_dim, "k_pages", "D");
  check.head_dim(pool.head_dim_v, "v_pages", "Dv");
  check.last_stride_one(k_pages, "k_pages");
  check.last_stride_one(v_pages, "v_pages");
  if (pool.num_kv_heads < 1) fail(check.op(), "k_pages must have at least one kv head, got ", pool.num_kv_heads);
  if (pool.page_size < 1) fail(check.op(), "k_pages: the page size must be at least 1, got ", pool.page_size);
  return pool;
}

PoolView pool_view(const Tensor& pages) { return {pages.data, pages.stride[0], pages.stride[1], pages.stride[2]}; }

RowsView rows_view(const Tensor& rows) { return {rows.data, rows.stride[0], rows.stride[1]}; }

// Starts of consecutive runs: from 0, never decreasing, within `limit`. Values on a card are trusted.
void check_starts(const ArgChecker& check, const Tensor& starts, const char* name, int64_t limit, const char* of) {
  if (check.device().type != DeviceType::cpu) return;
  int64_t previous = 0;
  for (int64_t i = 0; i < starts.shape[0]; ++i) {
    const int64_t start = starts.ptr<const int32_t>()[i * starts.stride[0]];
    if (i == 0 && start != 0) fail(check.op(), name, " must start at 0, got ", start);
    if (start < previous) {
      fail(check.op(), name, " must not decrease, got ", start, " after ", previous, " at entry ", i);
    }
    previous = start;
  }
  if (previous > limit) fail(check.op(), name, " must end within the ", limit, " ", of, ", got ", previous);
}

// Forms and values of the page table. Values are read: the CPU always checks them.
PageList check_table(const ArgChecker& check, const PageTable& table, int64_t num_requests, const PoolShape& pool) {
  const Tensor& indices = table.page_indices;
  const Tensor& lens = table.kv_lens;
  const int64_t heads = pool.num_kv_heads;
  PageList list = {};
  list.num_kv_heads = static_cast<int32_t>(heads);

  if (lens.ndim == 2) {
    check.tensor(lens, "kv_lens", DType::i32, {{"B", num_requests}, {"Hkv", heads}});
    list.per_head_len = true;
    list.lens_head_stride = lens.stride[1];
  } else {
    check.tensor(lens, "kv_lens", DType::i32, {{"B", num_requests}});
  }
  list.lens = lens.ptr<const int32_t>();
  list.lens_request_stride = lens.stride[0];

  int64_t capacity = 0;  // entries of one list, dense forms
  if (table.page_indptr) {
    const Tensor& indptr = *table.page_indptr;
    check.tensor(indices, "page_indices", DType::i32, {{"nnz"}});
    if (indptr.ndim == 1 && num_requests > 0 && heads > 1 && indptr.shape[0] == num_requests * heads + 1) {
      list.per_head_list = true;
    } else {
      check.tensor(indptr, "page_indptr", DType::i32, {{"B + 1 or B * Hkv + 1", num_requests + 1}});
    }
    check.tensor(indptr, "page_indptr", DType::i32, {{"B + 1 or B * Hkv + 1"}});
    list.indptr = indptr.ptr<const int32_t>();
    list.indptr_stride = indptr.stride[0];
    list.index_stride = indices.stride[0];
    check_starts(check, indptr, "page_indptr", indices.shape[0], "entries of page_indices");
  } else if (indices.ndim == 3) {
    check.tensor(indices, "page_indices", DType::i32, {{"B", num_requests}, {"Hkv", heads}, {"max_pages"}});
    list.per_head_list = true;
    list.request_stride = indices.stride[0];
    list.head_stride = indices.stride[1];
    list.index_stride = indices.stride[2];
    capacity = indices.shape[2];
  } else {
    check.tensor(indices, "page_indices", DType::i32, {{"B", num_requests}, {"max_pages"}});
    list.request_stride = indices.stride[0];
    list.index_stride = indices.stride[1];
    capacity = indices.shape[1];
  }
  list.indices = indices.ptr<const int32_t>();

  if (check.device().type != DeviceType::cpu)
    return list;  // values on a card are trusted: reading them would wait for it
  const int64_t lists = list.per_head() ? heads : 1;
  for (int64_t b = 0; b < num_requests; ++b) {
    for (int64_t h = 0; h < lists; ++h) {
      const int64_t len = list.len(b, h);
      if (list.indptr != nullptr) {
        const int64_t row = list.per_head_list ? b * heads + h : b;
        capacity = list.indptr[(row + 1) * list.indptr_stride] - list.indptr[row * list.indptr_stride];
      }
      if (len < 0) fail(check.op(), "kv_lens must not be negative, got ", len, " for request ", b);
      if (len > capacity * pool.page_size) {
        fail(check.op(), "kv_lens: request ", b, " has ", len, " keys, but its list of ", capacity, " pages of ",
             pool.page_size, " holds ", capacity * pool.page_size);
      }
      const int32_t* pages = list.pages(b, h);
      const int64_t used = (len + pool.page_size - 1) / pool.page_size;
      for (int64_t i = 0; i < used; ++i) {
        const int64_t page = pages[i * list.index_stride];
        if (page < 0 || page >= pool.num_pages) {
          fail(check.op(), "page_indices: request ", b, " needs page ", page, " of a pool of ", pool.num_pages,
               " pages (entry ", i, " of its list)");
        }
      }
    }
  }
  return list;
}

void check_score(const ArgChecker& check, const ScoreOptions& score, int64_t num_q_heads, const PoolShape& pool,
                 PagedProblem& problem) {
  const double scale = score.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(pool.head_dim)));
  check.finite(scale, "softmax_scale");
  check.finite(score.logits_soft_cap, "logits_soft_cap");
  if (score.logits_soft_cap < 0) {
    fail(check.op(), "logits_soft_cap must be 0 (none) or positive, got ", score.logits_soft_cap);
  }
  if (score.window_left < -1) {
    fail(check.op(), "window_left must be -1 (none) or at least 0, got ", score.window_left);
  }
  problem.softmax_scale = static_cast<float>(scale);
  problem.logits_soft_cap = static_cast<float>(score.logits_soft_cap);
  problem.window_left = std::min(score.window_left, kMaxLen);  // no request is longer; sums with it cannot overflow
  if (score.alibi_slopes) {
    check.tensor(*score.alibi_slopes, "alibi_slopes", DType::f32, {{"Hq", num_q_heads}});
    problem.alibi_slopes = score.alibi_slopes->ptr<const float>();
    problem.alibi_stride = score.alibi_slopes->stride[0];
  }
  if (score.sinks) {
    check.tensor(*score.sinks, "sinks", DType::f32, {{"Hq", num_q_heads}});
    problem.sinks = score.sinks->ptr<const float>();
    problem.sinks_stride = score.sinks->stride[0];
  }
  if (score.key_bias) {
    const Tensor& bias = *score.key_bias;
    if (bias.ndim == 3) {
      check.tensor(bias, "key_bias", DType::f32,
                   {{"N", pool.num_pages}, {"P", pool.page_size}, {"Hkv", pool.num_kv_heads}});
      problem.bias_head_stride = bias.stride[2];
    } else {
      check.tensor(bias, "key_bias", DType::f32, {{"N", pool.num_pages}, {"P", pool.page_size}});
    }
    problem.key_bias = bias.ptr<const float>();
    problem.bias_page_stride = bias.stride[0];
    problem.bias_token_stride = bias.stride[1];
  }
}

// What decode and prefill share. `rows` names q's first dimension.
PagedProblem check_attention(const ArgChecker& check, const PagedDecodeArgs& args, const char* rows,
                             int64_t num_requests) {
  check.float_dtype(args.q, "q");
  check.tensor(args.q, "q", args.q.dtype, {{rows}, {"Hq"}, {"D"}});
  const DType dtype = args.q.dtype;
  const PoolShape pool = check_pools(check, args.k_pages, args.v_pages, dtype);
  const int64_t num_tokens = args.q.shape[0], num_q_heads = args.q.shape[1];
  check.tensor(args.q, "q", dtype, {{rows}, {"Hq"}, {"D", pool.head_dim}});
  check.last_stride_one(args.q, "q");
  for (const auto& [tensor, name] : {std::pair{&args.q, "q"}, {&args.k_pages, "k_pages"}, {&args.v_pages, "v_pages"}}) {
    check.aligned_rows(*tensor, name);
  }
  if (check.device().type == DeviceType::cuda && dtype == DType::f32) {
    fail(check.op(), "q must be bfloat16 or float16 on a card, got float32");
  }
  if (num_q_heads < 1 || num_q_heads % pool.num_kv_heads != 0) {
    fail(check.op(), "q: the number of query heads must be a multiple of the ", pool.num_kv_heads,
         " kv heads of k_pages, got ", num_q_heads);
  }
  check.tensor(args.out, "out", dtype, {{rows, num_tokens}, {"Hq", num_q_heads}, {"Dv", pool.head_dim_v}});
  check.last_stride_one(args.out, "out");
  check.writable(args.out, "out");
  check.tensor(args.lse, "lse", DType::f32, {{rows, num_tokens}, {"Hq", num_q_heads}});
  check.writable(args.lse, "lse");

  PagedProblem problem = {};
  check_score(check, args.score, num_q_heads, pool, problem);
  problem.list = check_table(check, args.table, num_requests, pool);
  problem.dtype = dtype;
  problem.num_requests = static_cast<int32_t>(num_requests);
  problem.num_kv_heads = static_cast<int32_t>(pool.num_kv_heads);
  problem.group = static_cast<int32_t>(num_q_heads / pool.num_kv_heads);
  problem.head_dim = static_cast<int32_t>(pool.head_dim);
  problem.head_dim_v = static_cast<int32_t>(pool.head_dim_v);
  problem.num_tokens = num_tokens;
  problem.page_size = pool.page_size;
  problem.q = rows_view(args.q);
  problem.k = pool_view(args.k_pages);
  problem.v = pool_view(args.v_pages);
  problem.causal = true;
  problem.mask_width = -1;
  problem.out = rows_view(args.out);
  problem.lse = args.lse.ptr<float>();
  problem.lse_token_stride = args.lse.stride[0];
  problem.lse_head_stride = args.lse.stride[1];
  return problem;
}

void check_mask(const ArgChecker& check, const PagedPrefillArgs& args, PagedProblem& problem) {
  if (args.mask_width < -1) {
    fail(check.op(), "mask_width must be -1 (the request's own tokens) or at least 0, got ", args.mask_width);
  }
  if (!args.mask_bits) {
    if (args.mask_width != -1) fail(check.op(), "mask_width is given without mask_bits, got ", args.mask_width);
    return;
  }
  const Tensor& bits = *args.mask_bits;
  check.tensor(bits, "mask_bits", DType::i32, {{"T", problem.num_tokens}, {"words"}});
  const int64_t capacity = bits.shape[1] * 32;
  if (args.mask_width > capacity) {
    fail(check.op(), "mask_bits: ", bits.shape[1], " words a row hold ", capacity, " bits, mask_width wants ",
         args.mask_width);
  }
  if (args.mask_width == -1 && check.device().type == DeviceType::cpu) {
    for (int64_t b = 0; b < problem.num_requests; ++b) {
      if (problem.num_request_tokens(b) > capacity) {
        fail(check.op(), "mask_bits: ", bits.shape[1], " words a row hold ", capacity, " bits, request ", b, " has ",
             problem.num_request_tokens(b), " tokens");
      }
    }
  }
  problem.mask_bits = bits.ptr<const uint32_t>();
  problem.mask_token_stride = bits.stride[0];
  problem.mask_word_stride = bits.stride[1];
  problem.mask_width = args.mask_width;
}

}  // namespace

PagedProblem check_paged_decode(const PagedDecodeArgs& args) {
  const ArgChecker check("paged_decode", args.q.device);
  const int64_t num_requests = args.q.ndim > 0 ? args.q.shape[0] : 0;
  return check_attention(check, args, "B", num_requests);
}

PagedProblem check_paged_prefill(const PagedPrefillArgs& args) {
  const ArgChecker check("paged_prefill", args.q.device);
  check.tensor(args.qo_indptr, "qo_indptr", DType::i32, {{"B + 1"}});
  if (args.qo_indptr.shape[0] < 1) fail(check.op(), "qo_indptr must have shape [B + 1], got [0]");
  const int64_t num_requests = args.qo_indptr.shape[0] - 1;
  PagedProblem problem = check_attention(
      check, {args.q, args.k_pages, args.v_pages, args.table, args.score, args.out, args.lse}, "T", num_requests);
  check_starts(check, args.qo_indptr, "qo_indptr", problem.num_tokens, "tokens of q");
  problem.qo_indptr = args.qo_indptr.ptr<const int32_t>();
  problem.qo_indptr_stride = args.qo_indptr.stride[0];
  problem.causal = args.causal;
  check_mask(check, args, problem);
  return problem;
}

void check_append_kv(const AppendKvArgs& args) {
  const ArgChecker check("append_kv", args.k.device);
  check.float_dtype(args.k, "k");
  check.tensor(args.k, "k", args.k.dtype, {{"T"}, {"Hkv"}, {"D"}});
  const PoolShape pool = check_pools(check, args.k_pages, args.v_pages, args.k.dtype);
  check.writable(args.k_pages, "k_pages");
  check.writable(args.v_pages, "v_pages");
  const int64_t num_tokens = args.k.shape[0];
  check.tensor(args.k, "k", args.k.dtype, {{"T"}, {"Hkv", pool.num_kv_heads}, {"D", pool.head_dim}});
  check.tensor(args.v, "v", args.k.dtype, {{"T", num_tokens}, {"Hkv", pool.num_kv_heads}, {"Dv", pool.head_dim_v}});
  check.last_stride_one(args.k, "k");
  check.last_stride_one(args.v, "v");
  check.tensor(args.slot_mapping, "slot_mapping", DType::i64, {{"T", num_tokens}});
  if (args.k.device.type != DeviceType::cpu) return;
  const int64_t* slots = args.slot_mapping.ptr<const int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t slot = slots[t * args.slot_mapping.stride[0]];
    if (slot >= pool.num_pages * pool.page_size) {
      fail(check.op(), "slot_mapping: token ", t, " goes to slot ", slot, " of a pool of ", pool.num_pages,
           " pages of ", pool.page_size);
    }
  }
}

}  // namespace kvk
