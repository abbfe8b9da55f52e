#include "core/paged_check.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/joint_check.h"
#include "core/record_check.h"
#include "core/value_errors.h"

namespace kvk {
namespace {

constexpr int64_t kMaxLen = int64_t{1} << 31;  // lengths are int32

struct PoolShape {
  int64_t num_pages, page_size, num_kv_heads, head_dim, head_dim_v;
  int64_t num_dense_pages = -1;  // of the pool beside the records; -1: page references carry no tag

  int64_t all_pages() const { return num_pages + std::max<int64_t>(0, num_dense_pages); }
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

// One entry of a page table in use.
void check_page(const ArgChecker& check, const PoolShape& pool, int64_t entry, int64_t request, int64_t index) {
  int64_t page = entry, limit = pool.num_pages;
  const char* kind = "";
  if (pool.num_dense_pages >= 0 && entry >= 0) {
    const PageReference reference(entry);
    if (reference.tag > 1) fail_tag(check.op(), request, reference.tag, index);
    page = reference.page;
    if (reference.tag == 1) {
      limit = pool.num_dense_pages;
      kind = "dense ";
    }
  }
  if (page < 0 || page >= limit) fail_page(check.op(), request, kind, page, limit, index);
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
    check.starts(indptr, "page_indptr", indices.shape[0], "entries of page_indices");
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
      if (len < 0) fail_negative_len(check.op(), len, b);
      if (len > capacity * pool.page_size) fail_len_past_list(check.op(), b, len, capacity, pool.page_size);
      const int32_t* pages = list.pages(b, h);
      const int64_t used = (len + pool.page_size - 1) / pool.page_size;
      for (int64_t i = 0; i < used; ++i) {
        check_page(check, pool, pages[i * list.index_stride], b, i);
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
                   {{"N", pool.all_pages()}, {"P", pool.page_size}, {"Hkv", pool.num_kv_heads}});
      problem.bias_head_stride = bias.stride[2];
    } else {
      check.tensor(bias, "key_bias", DType::f32, {{"N", pool.all_pages()}, {"P", pool.page_size}});
    }
    problem.key_bias = bias.ptr<const float>();
    problem.bias_page_stride = bias.stride[0];
    problem.bias_token_stride = bias.stride[1];
  }
}

// What an op attends with, whatever its pages are.
struct Queries {
  const Tensor& q;
  const PageTable& table;
  const ScoreOptions& score;
  const Tensor& out;
  const Tensor& lse;
  const char* rows;  // names q's first dimension
  int64_t num_requests;
};

// The problem without its pools.
PagedProblem check_queries(const ArgChecker& check, const Queries& args, const PoolShape& pool) {
  const DType dtype = args.q.dtype;
  const int64_t num_tokens = args.q.shape[0], num_q_heads = args.q.shape[1];
  check.tensor(args.q, "q", dtype, {{args.rows}, {"Hq"}, {"D", pool.head_dim}});
  check.last_stride_one(args.q, "q");
  check.aligned_rows(args.q, "q");
  check.no_f32_on_card(args.q, "q");
  if (num_q_heads < 1 || num_q_heads % pool.num_kv_heads != 0) {
    fail(check.op(), "q: the number of query heads must be a multiple of the ", pool.num_kv_heads,
         " kv heads of the pages, got ", num_q_heads);
  }
  check.tensor(args.out, "out", dtype, {{args.rows, num_tokens}, {"Hq", num_q_heads}, {"Dv", pool.head_dim_v}});
  check.last_stride_one(args.out, "out");
  check.writable(args.out, "out");
  check.tensor(args.lse, "lse", DType::f32, {{args.rows, num_tokens}, {"Hq", num_q_heads}});
  check.writable(args.lse, "lse");

  PagedProblem problem = {};
  check_score(check, args.score, num_q_heads, pool, problem);
  problem.list = check_table(check, args.table, args.num_requests, pool);
  problem.dtype = dtype;
  problem.num_requests = static_cast<int32_t>(args.num_requests);
  problem.num_kv_heads = static_cast<int32_t>(pool.num_kv_heads);
  problem.group = static_cast<int32_t>(num_q_heads / pool.num_kv_heads);
  problem.head_dim = static_cast<int32_t>(pool.head_dim);
  problem.head_dim_v = static_cast<int32_t>(pool.head_dim_v);
  problem.num_tokens = num_tokens;
  problem.page_size = pool.page_size;
  problem.num_pages = pool.num_pages;
  problem.num_dense_pages = pool.num_dense_pages;
  problem.q = rows_view(args.q);
  problem.causal = true;
  problem.mask_width = -1;
  problem.out = rows_view(args.out);
  problem.lse = args.lse.ptr<float>();
  problem.lse_token_stride = args.lse.stride[0];
  problem.lse_head_stride = args.lse.stride[1];
  return problem;
}

void check_q(const ArgChecker& check, const Tensor& q, const char* rows) {
  check.float_dtype(q, "q");
  check.tensor(q, "q", q.dtype, {{rows}, {"Hq"}, {"D"}});
}

// What decode and prefill share. `rows` names q's first dimension.
PagedProblem check_attention(const ArgChecker& check, const PagedDecodeArgs& args, const char* rows,
                             int64_t num_requests) {
  check_q(check, args.q, rows);
  const PoolShape pool = check_pools(check, args.k_pages, args.v_pages, args.q.dtype);
  check.aligned_rows(args.k_pages, "k_pages");
  check.aligned_rows(args.v_pages, "v_pages");
  PagedProblem problem =
      check_queries(check, {args.q, args.table, args.score, args.out, args.lse, rows, num_requests}, pool);
  problem.k = pool_view(args.k_pages);
  problem.v = pool_view(args.v_pages);
  return problem;
}

// The same over records and dense pages, of any format.
template <class Args>
PagedProblem check_record_attention(const ArgChecker& check, const Args& args, const char* rows, int64_t num_requests,
                                    RecordPools& pools) {
  const auto& format = args.format;
  check_q(check, args.q, rows);
  check_record_pool(check, args.k_pool, "k_pool", -1, -1, format.k_layout().record_bytes);
  PoolShape pool = {args.k_pool.shape[0], format.page_size,  args.k_pool.shape[1],
                    format.head_dim,      format.head_dim_v, 0};
  check_record_pool(check, args.v_pool, "v_pool", pool.num_pages, pool.num_kv_heads, format.v_layout().record_bytes);
  if (pool.num_kv_heads < 1) fail(check.op(), "k_pool must have at least one kv head, got ", pool.num_kv_heads);
  if (args.k_pages.has_value() != args.v_pages.has_value()) {
    fail(check.op(), "k_pages and v_pages go together, got no ", args.k_pages ? "v_pages" : "k_pages");
  }
  if (args.k_pages) {
    const PoolShape dense = check_pools(check, *args.k_pages, *args.v_pages, args.q.dtype);
    check.tensor(*args.k_pages, "k_pages", args.q.dtype,
                 {{"M"}, {"P", pool.page_size}, {"Hkv", pool.num_kv_heads}, {"D", pool.head_dim}});
    check.tensor(*args.v_pages, "v_pages", args.q.dtype,
                 {{"M"}, {"P", pool.page_size}, {"Hkv", pool.num_kv_heads}, {"Dv", pool.head_dim_v}});
    check.aligned_rows(*args.k_pages, "k_pages");
    check.aligned_rows(*args.v_pages, "v_pages");
    pool.num_dense_pages = dense.num_pages;
  }
  PagedProblem problem =
      check_queries(check, {args.q, args.table, args.score, args.out, args.lse, rows, num_requests}, pool);
  problem.k = args.k_pages ? pool_view(*args.k_pages) : PoolView{};
  problem.v = args.v_pages ? pool_view(*args.v_pages) : PoolView{};
  pools = {args.k_pool.template ptr<const uint8_t>(),
           args.v_pool.template ptr<const uint8_t>(),
           args.k_pool.stride[0],
           args.k_pool.stride[1],
           args.v_pool.stride[0],
           args.v_pool.stride[1],
           pool.num_pages};
  problem.records = &pools;
  return problem;
}

void check_mask(const ArgChecker& check, const std::optional<Tensor>& mask_bits, int64_t mask_width,
                PagedProblem& problem) {
  if (mask_width < -1) {
    fail(check.op(), "mask_width must be -1 (the request's own tokens) or at least 0, got ", mask_width);
  }
  if (!mask_bits) {
    if (mask_width != -1) fail(check.op(), "mask_width is given without mask_bits, got ", mask_width);
    return;
  }
  const Tensor& bits = *mask_bits;
  check.tensor(bits, "mask_bits", DType::i32, {{"T", problem.num_tokens}, {"words"}});
  const int64_t capacity = bits.shape[1] * 32;
  if (mask_width > capacity) {
    fail(check.op(), "mask_bits: ", bits.shape[1], " words a row hold ", capacity, " bits, mask_width wants ",
         mask_width);
  }
  if (mask_width == -1 && check.device().type == DeviceType::cpu) {
    for (int64_t b = 0; b < problem.num_requests; ++b) {
      if (problem.num_request_tokens(b) > capacity) {
        fail_tokens_past_mask(check.op(), bits.shape[1], b, problem.num_request_tokens(b));
      }
    }
  }
  problem.mask_bits = bits.ptr<const uint32_t>();
  problem.mask_token_stride = bits.stride[0];
  problem.mask_word_stride = bits.stride[1];
  problem.mask_words = bits.shape[1];
  problem.mask_width = mask_width;
}

}  // namespace

PagedProblem check_paged_decode(const PagedDecodeArgs& args) {
  const ArgChecker check("paged_decode", args.q.device);
  const int64_t num_requests = args.q.ndim > 0 ? args.q.shape[0] : 0;
  return check_attention(check, args, "B", num_requests);
}

namespace {

// Requests that qo_indptr tells apart.
int64_t check_requests(const ArgChecker& check, const Tensor& qo_indptr) {
  check.tensor(qo_indptr, "qo_indptr", DType::i32, {{"B + 1"}});
  if (qo_indptr.shape[0] < 1) fail(check.op(), "qo_indptr must have shape [B + 1], got [0]");
  return qo_indptr.shape[0] - 1;
}

void check_prefill(const ArgChecker& check, const Tensor& qo_indptr, bool causal, PagedProblem& problem) {
  check.starts(qo_indptr, "qo_indptr", problem.num_tokens, "tokens of q");
  problem.qo_indptr = qo_indptr.ptr<const int32_t>();
  problem.qo_indptr_stride = qo_indptr.stride[0];
  problem.causal = causal;
}

}  // namespace

PagedProblem check_paged_prefill(const PagedPrefillArgs& args) {
  const ArgChecker check("paged_prefill", args.q.device);
  const int64_t num_requests = check_requests(check, args.qo_indptr);
  PagedProblem problem = check_attention(
      check, {args.q, args.k_pages, args.v_pages, args.table, args.score, args.out, args.lse}, "T", num_requests);
  check_prefill(check, args.qo_indptr, args.causal, problem);
  check_mask(check, args.mask_bits, args.mask_width, problem);
  return problem;
}

namespace {

// `pools` and its pointer in the problem, after the checks.
template <class Args, class Pools>
PagedProblem check_record_decode(const ArgChecker& check, const Args& args, Pools& pools,
                                 const Pools* PagedProblem::* format) {
  PagedProblem problem = check_record_attention(check, args, "B", args.q.ndim > 0 ? args.q.shape[0] : 0, pools);
  pools.format = args.format;
  problem.*format = &pools;
  if constexpr (requires { args.k_permutation; }) {
    check_restored(check, args.k_permutation, args.k_rope, args.format, problem, pools);
  }
  return problem;
}

template <class Args, class Pools>
PagedProblem check_record_prefill(const ArgChecker& check, const Args& args, Pools& pools,
                                  const Pools* PagedProblem::* format) {
  const int64_t num_requests = check_requests(check, args.qo_indptr);
  PagedProblem problem = check_record_attention(check, args, "T", num_requests, pools);
  pools.format = args.format;
  problem.*format = &pools;
  if constexpr (requires { args.k_permutation; }) {
    check_restored(check, args.k_permutation, args.k_rope, args.format, problem, pools);
  }
  check_prefill(check, args.qo_indptr, args.causal, problem);
  check_mask(check, args.mask_bits, args.mask_width, problem);
  return problem;
}

// The kernels multiply with the kept values as they are stored.
void check_value_dtype(const ArgChecker& check, const Tensor& q, DType dtype) {
  if (q.dtype != DType::f32 && q.dtype != dtype) {
    fail(check.op(), "q must be ", dtype_name(dtype), " like the records' values, or float32, got ",
         dtype_name(q.dtype));
  }
}

}  // namespace

PagedProblem check_quant_decode(const QuantDecodeArgs& args, QuantPools& pools) {
  return check_record_decode(ArgChecker("quant_decode", args.q.device), args, pools, &PagedProblem::quant);
}

PagedProblem check_quant_prefill(const QuantPrefillArgs& args, QuantPools& pools) {
  return check_record_prefill(ArgChecker("quant_prefill", args.q.device), args, pools, &PagedProblem::quant);
}

PagedProblem check_sparse_decode(const SparseDecodeArgs& args, BitmapPools& pools) {
  const ArgChecker check("sparse_decode", args.q.device);
  check_value_dtype(check, args.q, args.format.dtype);
  return check_record_decode(check, args, pools, &PagedProblem::bitmap);
}

PagedProblem check_sparse_prefill(const SparsePrefillArgs& args, BitmapPools& pools) {
  const ArgChecker check("sparse_prefill", args.q.device);
  check_value_dtype(check, args.q, args.format.dtype);
  return check_record_prefill(check, args, pools, &PagedProblem::bitmap);
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
      fail_slot(check.op(), t, slot, pool.num_pages, pool.page_size);
    }
  }
}

}  // namespace kvk
