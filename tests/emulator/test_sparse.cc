// Records of bitmaps on CUDA over the emulator: made, read back and attended over beside dense pages, with libkvk's own checks and
// launch code. Lengths take every pipeline around several times; two pages of three are records.
#include "emulator/record_case.h"
#include "emulator/record_kernels.h"
#include "kvk/device/sparse.cuh"

#define KVK_SPARSE(T, D)                                                                                        \
  KVK_EMULATED_KERNEL(                                                                                          \
      kvk::device::compress_kernel<kvk::device::SparseCoding<T, T, D, false, kvk::device::Select::magnitude>>); \
  KVK_EMULATED_KERNEL(kvk::device::decompress_kernel<T, D, false>)

KVK_SPARSE(kvk::device::bf16, 64);
KVK_RECORD_DECODE(bf16, 64, 64, 2, 0, false, BitmapPages<32, false, 16, false>);
KVK_RECORD_PREFILL(bf16, 64, 64, 0, false, BitmapPages<32, false, 16, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 64>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 64>);
// Bitmaps of 5 and 9 bytes a row; a bias for every key.
KVK_SPARSE(kvk::device::f16, 40);
KVK_SPARSE(kvk::device::f16, 72);
KVK_RECORD_PREFILL(f16, 40, 72, 4, false, BitmapPages<24, false, 72, false>);
KVK_RECORD_DECODE(f16, 40, 72, 2, 4, false, BitmapPages<24, false, 72, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 72>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 72>);

namespace kvk {
namespace {

using Case = RecordCase<BitmapFormat>;

// Whether a row holds its largest elements, of equal ones the first, and reads back as those and zeros.
bool right_row(const Case& c, bool is_v, size_t i, int64_t token, int64_t head) {
  const BitmapLayout layout = is_v ? c.format().v_layout() : c.format().k_layout();
  const int64_t dim = is_v ? c.format().head_dim_v : c.format().head_dim;
  const uint8_t* bitmap = c.record(is_v, i, head) + layout.bitmap_offset + token * layout.bitmap_row_bytes;
  std::vector<int64_t> order(static_cast<size_t>(dim));
  for (int64_t d = 0; d < dim; ++d) order[static_cast<size_t>(d)] = d;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::fabs(c.original(is_v, i, token, head, a)) > std::fabs(c.original(is_v, i, token, head, b));
  });
  for (int64_t rank = 0; rank < dim; ++rank) {
    const int64_t d = order[static_cast<size_t>(rank)];
    const bool keep = rank < (is_v ? c.format().v : c.format().k).keep;
    const double want = keep ? c.original(is_v, i, token, head, d) : 0.0;
    if ((bitmap[d / 8] >> d % 8 & 1) != int{keep} || c.restored(is_v, i, token, head, d) != want) return false;
  }
  return true;
}

void check_records(const Case& c, const test::Spec& spec) {
  bool right = c.num_packed() > 0, clear = right;
  for (size_t i = 0; i < c.num_packed(); ++i) {
    for (const bool is_v : {false, true}) {
      const BitmapLayout layout = is_v ? c.format().v_layout() : c.format().k_layout();
      for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
        for (int64_t token = 0; token < spec.page_size; ++token) right = right && right_row(c, is_v, i, token, head);
        const uint8_t* record = c.record(is_v, i, head);
        clear = clear && std::all_of(record + layout.bitmap_offset + spec.page_size * layout.bitmap_row_bytes,
                                     record + layout.record_bytes, [](uint8_t byte) { return byte == 0; });
      }
    }
  }
  emu::expect(right, "the largest elements of the rows of " + std::to_string(c.num_packed()) + " pages");
  emu::expect(clear, "zeros behind the bitmaps");
}

void run(const std::string& what, const test::Spec& spec, const BitmapFormat& format, int num_sms = 4) {
  Case(spec, format, num_sms, [&](const Case& c) { check_records(c, spec); }).attend(what);
}

void half_cases() {
  const BitmapFormat half = {32, 64, 64, DType::bf16, {32, 0}, {16, 0}};
  test::Spec spec = {.dtype = DType::bf16,
                     .num_heads = 18,
                     .num_kv_heads = 2,
                     .head_dim = 64,
                     .head_dim_v = 64,
                     .page_size = 32,
                     .lens = {0, 1, 77, 1100, 513}};
  run("decode bf16 18/2 heads, 1 to 3 splits, an empty request", spec, half);
  spec.table = test::Table::csr;
  spec.lens = {600, 1030};
  run("decode, CSR, a block takes several splits", spec, half, 1);
  spec.table = test::Table::dense;
  spec.heads_first = true;
  spec.lens = {170, 0, 330, 40};
  spec.tokens = {70, 2, 3, 0};
  spec.unowned_tokens = 2;
  run("prefill: tiled and streamed requests, one without keys, one without tokens, rows of no request", spec, half);
}

void odd_cases() {
  const BitmapFormat odd = {17, 40, 72, DType::f16, {24, 0}, {72, 0}};
  test::Spec spec = {.dtype = DType::f16,
                     .num_heads = 10,
                     .num_kv_heads = 1,
                     .head_dim = 40,
                     .head_dim_v = 72,
                     .page_size = 17,
                     .lens = {700, 33, 130},
                     .window_left = 599,
                     .key_bias = true};
  run("decode f16 10/1 heads, D 40 and 72, whole values, bias, window", spec, odd);
  spec.lens = {300, 140};
  spec.tokens = {40, 1};
  spec.window_left = 60;
  run("prefill of those with a bias and a window", spec, odd);
}

}  // namespace
}  // namespace kvk

int main() {
  return kvk::emu::run_tests([] {
    kvk::half_cases();
    kvk::odd_cases();
  });
}
