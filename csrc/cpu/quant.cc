// Quantizing and dequantizing on the CPU: pages, or runs of rows, for the threads.
#include <algorithm>

#include "cpu/backend.h"
#include "cpu/levels.h"
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

void quantize_pages(const QuantizePagesArgs& args, Threads& threads) {
  const QuantFormat& format = args.format;
  const int64_t num_heads = args.k_pages.shape[2];
  for_each_record(threads, args.src.shape[0], num_heads, [&](int64_t i, int64_t head, bool is_v) {
    const Tensor& pages = is_v ? args.v_pages : args.k_pages;
    const QuantPart& part = is_v ? format.v : format.k;
    const int64_t dim = is_v ? format.head_dim_v : format.head_dim;
    const int64_t from = id_at(args.src, i);
    const int64_t to = id_at(args.dst, i);
    uint8_t* record = record_at(is_v ? args.v_pool : args.k_pool, to, head);
    QuantBlock block = record_block(part, format.page_size, dim, record);
    block.clip = static_cast<float>(is_v ? args.v_clip : args.k_clip);
    block.dtype = pages.dtype;
    block.x = dense_at(pages, from, head);
    block.token_stride = pages.stride[1];
    if (head + 1 < num_heads) block.ahead = dense_at(pages, from, head + 1);
    kernels().quantize_block(block);
    clear_padding(part, format.page_size, dim, record);
  });
}

void dequantize_pages(const DequantizePagesArgs& args, Threads& threads) {
  const QuantFormat& format = args.format;
  const int64_t num_heads = args.k_pool.shape[1];
  for_each_record(threads, args.ids.shape[0], num_heads, [&](int64_t i, int64_t head, bool is_v) {
    const Tensor& out = is_v ? args.v : args.k;
    const int64_t page = id_at(args.ids, i);
    QuantBlock block =
        record_block(is_v ? format.v : format.k, format.page_size, is_v ? format.head_dim_v : format.head_dim,
                     record_at(is_v ? args.v_pool : args.k_pool, page, head));
    block.dtype = out.dtype;
    block.x = dense_at(out, i, head);
    block.token_stride = out.stride[1];
    kernels().dequantize_block(block);
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
