// Compressing and decompressing on the CPU: a record at a time for the threads.
#include <algorithm>

#include "cpu/backend.h"
#include "cpu/levels.h"
#include "cpu/records.h"

namespace kvk::cpu {
namespace {

SparseBlock record_block(const BitmapFormat& format, bool is_v, uint8_t* record) {
  SparseBlock block = {};
  block.part = is_v ? format.v : format.k;
  block.value_dtype = format.dtype;
  block.tokens = format.page_size;
  block.dim = is_v ? format.head_dim_v : format.head_dim;
  block.values = record;
  block.bitmap = record + (is_v ? format.v_layout() : format.k_layout()).bitmap_offset;
  return block;
}

}  // namespace

void compress_pages(const CompressPagesArgs& args, Threads& threads) {
  const BitmapFormat& format = args.format;
  for_each_record(threads, args.src.shape[0], args.k_pages.shape[2], [&](int64_t i, int64_t head, bool is_v) {
    const Tensor& pages = is_v ? args.v_pages : args.k_pages;
    const BitmapLayout layout = is_v ? format.v_layout() : format.k_layout();
    uint8_t* record = record_at(is_v ? args.v_pool : args.k_pool, id_at(args.dst, i), head);
    SparseBlock block = record_block(format, is_v, record);
    block.dtype = pages.dtype;
    block.x = dense_at(pages, id_at(args.src, i), head);
    block.token_stride = pages.stride[1];
    block.ahead = rows_ahead(args.src, args.k_pages, args.v_pages, i, head, is_v);
    const std::optional<Tensor>& select = is_v ? args.v_select : args.k_select;
    if (select) {
      const int64_t size = element_size(select->dtype);
      block.select = select->ptr<const char>() + (i * select->stride[0] + head * select->stride[2]) * size;
      block.select_dtype = select->dtype;
      block.select_stride = select->stride[1] * size;
    }
    kernels().compress_block(block);
    std::fill(block.bitmap + format.page_size * layout.bitmap_row_bytes, record + layout.record_bytes, uint8_t{0});
  });
}

void decompress_pages(const DecompressPagesArgs& args, Threads& threads) {
  const BitmapFormat& format = args.format;
  for_each_record(threads, args.ids.shape[0], args.k_pool.shape[1], [&](int64_t i, int64_t head, bool is_v) {
    const Tensor& out = is_v ? args.v : args.k;
    SparseBlock block =
        record_block(format, is_v, record_at(is_v ? args.v_pool : args.k_pool, id_at(args.ids, i), head));
    block.dtype = out.dtype;
    block.x = dense_at(out, i, head);
    block.token_stride = out.stride[1];
    kernels().decompress_block(block);
  });
}

}  // namespace kvk::cpu
