// Quantizing and dequantizing on the CPU: pages, or runs of rows, for the threads.
#include <algorithm>

#include "cpu/backend.h"
#include "cpu/levels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/records.h"

namespace kvk::cpu {
namespace {

// The parts of one record.
QuantBlock record_block(const QuantPart& part, int64_t page_size, int64_t dim, uint8_t* record) {
  const QuantLayout layout = device::quant_layout(page_size, dim, part);
  QuantBlock block = {};
  block.part = part;
  block.clip = 1.0f;
  block.tokens = page_size;
  block.dim = dim;
  block.codes = record;
  block.scale = reinterpret_cast<f16*>(record + layout.scale_offset);
  block.min = reinterpret_cast<f16*>(record + layout.min_offset);
  return block;
}

// Zeros behind each part of a record.
void clear_padding(const QuantPart& part, int64_t page_size, int64_t dim, uint8_t* record) {
  const QuantLayout layout = device::quant_layout(page_size, dim, part);
  std::fill(record + page_size * layout.row_bytes, record + layout.scale_offset, uint8_t{0});
  std::fill(record + layout.scale_offset + layout.num_scales * 2, record + layout.min_offset, uint8_t{0});
  std::fill(record + layout.min_offset + layout.num_scales * 2, record + layout.record_bytes, uint8_t{0});
}

// Runs of rows of [..., T, n] that can be worked on apart.
struct RowRuns {
  int64_t matrices, tokens, run, runs;  // runs of `run` rows in each matrix

  RowRuns(const Tensor& x, const QuantPart& part) {
    tokens = x.ndim > 1 ? x.shape[x.ndim - 2] : 1;
    matrices = 1;
    for (int i = 0; i < x.ndim - 2; ++i) matrices *= x.shape[i];
    run = part.along_tokens ? part.group : 64;
    runs = (tokens + run - 1) / run;
  }
};

QuantBlock run_block(const Tensor& x, const QuantPart& part, const Tensor& codes, const Tensor& scale,
                     const Tensor& min, const RowRuns& rows, int64_t i) {
  const int64_t n = x.shape[x.ndim - 1], matrix = i / rows.runs, token = i % rows.runs * rows.run;
  int64_t offset = 0, rest = matrix;
  for (int d = x.ndim - 3; d >= 0; --d) {
    offset += rest % x.shape[d] * x.stride[d];
    rest /= x.shape[d];
  }
  QuantBlock block = {};
  block.part = part;
  block.clip = 1.0f;
  block.tokens = std::min(rows.run, rows.tokens - token);
  block.dim = n;
  block.dtype = x.dtype;
  block.token_stride = x.ndim > 1 ? x.stride[x.ndim - 2] : 0;
  block.x = x.ptr<char>() + (offset + token * block.token_stride) * element_size(x.dtype);
  const int64_t row = matrix * rows.tokens + token;
  block.codes = codes.ptr<uint8_t>() + row * (n * part.bits / 8);
  block.scale = scale.ptr<f16>() + row * n / part.group;
  block.min = min.ptr<f16>() + row * n / part.group;
  return block;
}

}  // namespace

namespace {

// One side, K or V, of quantize_pages or dequantize_pages.
struct Side {
  const QuantPart& part;
  const Tensor& pages;  // dense
  const Tensor& pool;   // records
  int64_t dim;
  float clip;
  Permutation permutation;

  // Whether the rows of several heads, or of one in another order, go through fp32 rows of their own.
  bool joint() const { return part.rotate > 1 || permutation.channels != nullptr; }
};

// Pages of one side: dense page `from` and record `to`, for kv head `head`; ahead: the rows that come next, or null.
void quantize_record(const Side& side, int64_t page_size, int64_t from, int64_t to, int64_t head, const void* ahead) {
  uint8_t* record = record_at(side.pool, to, head);
  QuantBlock block = record_block(side.part, page_size, side.dim, record);
  block.clip = side.clip;
  block.dtype = side.pages.dtype;
  block.x = dense_at(side.pages, from, head);
  block.token_stride = side.pages.stride[1];
  block.ahead = ahead;
  kernels().quantize_block(block);
  clear_padding(side.part, page_size, side.dim, record);
}

void dequantize_record(const Side& side, int64_t page_size, int64_t from, int64_t to, int64_t head) {
  QuantBlock block = record_block(side.part, page_size, side.dim, record_at(side.pool, from, head));
  block.dtype = side.pages.dtype;
  block.x = dense_at(side.pages, to, head);
  block.token_stride = side.pages.stride[1];
  kernels().dequantize_block(block);
}

// The same for a group of heads, over fp32 rows [page_size][heads * dim].
JointBlock joint_block(const Side& side, int64_t page_size, int64_t dense_page, int64_t group, float* rows) {
  const int64_t heads = side.part.joint_heads();
  return {page_size,
          side.dim,
          heads,
          side.pages.dtype,
          dense_at(side.pages, dense_page, group * heads),
          side.pages.stride[1],
          side.pages.stride[2],
          side.part.rotate != 0,
          side.permutation,
          group,
          rows};
}

template <class F>
void for_each_head(const Side& side, int64_t page_size, int64_t record_page, const JointBlock& joint, const F& f) {
  for (int64_t h = 0; h < joint.heads; ++h) {
    uint8_t* record = record_at(side.pool, record_page, joint.group * joint.heads + h);
    QuantBlock block = record_block(side.part, page_size, side.dim, record);
    block.part.rotate = 0;
    block.clip = side.clip;
    block.dtype = DType::f32;
    block.x = joint.rows + h * side.dim;
    block.token_stride = joint.heads * side.dim;
    f(block, record);
  }
}

void quantize_group(const Side& side, int64_t page_size, int64_t from, int64_t to, int64_t group) {
  const Buffer rows = allocate(page_size * side.part.joint_heads() * side.dim * int64_t{sizeof(float)});
  const JointBlock joint = joint_block(side, page_size, from, group, reinterpret_cast<float*>(rows.get()));
  kernels().join_rows(joint);
  for_each_head(side, page_size, to, joint, [&](const QuantBlock& block, uint8_t* record) {
    kernels().quantize_block(block);
    clear_padding(side.part, page_size, side.dim, record);
  });
}

void dequantize_group(const Side& side, int64_t page_size, int64_t from, int64_t to, int64_t group) {
  const Buffer rows = allocate(page_size * side.part.joint_heads() * side.dim * int64_t{sizeof(float)});
  const JointBlock joint = joint_block(side, page_size, to, group, reinterpret_cast<float*>(rows.get()));
  for_each_head(side, page_size, from, joint,
                [&](const QuantBlock& block, uint8_t*) { kernels().dequantize_block(block); });
  kernels().split_rows(joint);
}

Permutation permutation_of(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<const int32_t>(), t->stride[0], t->stride[1]};
}

}  // namespace

void quantize_pages(const QuantizePagesArgs& args, Threads& threads) {
  const QuantFormat& format = args.format;
  const int64_t num_heads = args.k_pages.shape[2];
  const Side k = {format.k,
                  args.k_pages,
                  args.k_pool,
                  format.head_dim,
                  static_cast<float>(args.k_clip),
                  permutation_of(args.k_permutation)};
  const Side v = {format.v, args.v_pages, args.v_pool, format.head_dim_v, static_cast<float>(args.v_clip), {}};
  for_each_record(threads, args.src.shape[0], num_heads, [&](int64_t i, int64_t head, bool is_v) {
    const Side& side = is_v ? v : k;
    const int64_t from = id_at(args.src, i);
    const int64_t to = id_at(args.dst, i);
    if (!side.joint()) {
      const void* ahead = rows_ahead(args.src, args.k_pages, args.v_pages, i, head, is_v);
      return quantize_record(side, format.page_size, from, to, head, ahead);
    }
    const int64_t heads = side.part.joint_heads();
    if (head % heads == 0) quantize_group(side, format.page_size, from, to, head / heads);
  });
}

void dequantize_pages(const DequantizePagesArgs& args, Threads& threads) {
  const QuantFormat& format = args.format;
  const int64_t num_heads = args.k_pool.shape[1];
  const Side k = {format.k, args.k, args.k_pool, format.head_dim, 1.0f, permutation_of(args.k_permutation)};
  const Side v = {format.v, args.v, args.v_pool, format.head_dim_v, 1.0f, {}};
  for_each_record(threads, args.ids.shape[0], num_heads, [&](int64_t i, int64_t head, bool is_v) {
    const Side& side = is_v ? v : k;
    const int64_t page = id_at(args.ids, i);
    if (!side.joint()) return dequantize_record(side, format.page_size, page, i, head);
    const int64_t heads = side.part.joint_heads();
    if (head % heads == 0) dequantize_group(side, format.page_size, page, i, head / heads);
  });
}

void quantize(const QuantizeArgs& args, Threads& threads) {
  const RowRuns rows(args.x, args.part);
  parallel_ranges(threads, rows.matrices * rows.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      QuantBlock block = run_block(args.x, args.part, args.codes, args.scale, args.min, rows, i);
      block.clip = static_cast<float>(args.clip);
      kernels().quantize_block(block);
    }
  });
}

void dequantize(const DequantizeArgs& args, Threads& threads) {
  const RowRuns rows(args.x, args.part);
  parallel_ranges(threads, rows.matrices * rows.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().dequantize_block(run_block(args.x, args.part, args.codes, args.scale, args.min, rows, i));
    }
  });
}

}  // namespace kvk::cpu
