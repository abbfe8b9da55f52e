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

// Attends over the records that it makes.
auto over(const BitmapFormat& format) {
  return [format](const std::string& what, const test::Spec& spec, int num_sms) {
    Case(spec, format, num_sms, [&](const Case& c) { check_records(c, spec); }).attend(what);
  };
}

}  // namespace
}  // namespace kvk

int main() {
  using namespace kvk;
  return emu::run_tests([] {
    run_even_cases("half", over(BitmapFormat{32, 64, 64, DType::bf16, {32, 0}, {16, 0}}));
    run_odd_cases("whole values", 17, over(BitmapFormat{17, 40, 72, DType::f16, {24, 0}, {72, 0}}));
  });
}
