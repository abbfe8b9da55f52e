// Quantized records on CUDA over the emulator: made, read back and attended over beside dense pages, with libkvk's own checks and
// launch code. Lengths take every pipeline around several times; two pages of three are records.
#include "emulator/record_case.h"
#include "emulator/record_kernels.h"
#include "kvk/device/quant.cuh"

#define KVK_QUANT(...)                                                                      \
  KVK_EMULATED_KERNEL(kvk::device::quantize_kernel<kvk::device::QuantCoding<__VA_ARGS__>>); \
  KVK_EMULATED_KERNEL(kvk::device::dequantize_kernel<kvk::device::QuantCoding<__VA_ARGS__>>)

// KIVI, 2 bits.
KVK_QUANT(kvk::device::bf16, 2, true, 0);
KVK_QUANT(kvk::device::bf16, 2, false, 0);
KVK_RECORD_DECODE(bf16, 64, 64, 2, 0, false, QuantPages<2, 32, true, false, 2, 32, false, false>);
KVK_RECORD_PREFILL(bf16, 64, 64, 0, false, QuantPages<2, 32, true, false, 2, 32, false, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 64>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 64>);
// 8 bits a channel group, 3 bits for 17 tokens, head dims off 16; a bias for every key.
KVK_QUANT(kvk::device::f16, 8, false, 0);
KVK_QUANT(kvk::device::f16, 3, true, 0);
KVK_RECORD_PREFILL(f16, 40, 72, 4, false, QuantPages<8, 40, false, false, 3, 17, true, false>);
KVK_RECORD_DECODE(f16, 40, 72, 2, 4, false, QuantPages<8, 40, false, false, 3, 17, true, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::f16, 72>);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::f16, 72>);

namespace kvk {
namespace {

using Case = RecordCase<QuantFormat>;

// Every element reads back within half a step of a group of numbers between -1 and 1; what lies between the parts is 0.
void check_records(const Case& c, const test::Spec& spec) {
  double worst = 0;
  bool clear = c.num_packed() > 0;
  for (size_t i = 0; i < c.num_packed(); ++i) {
    for (const bool is_v : {false, true}) {
      const QuantPart& part = is_v ? c.format().v : c.format().k;
      const QuantLayout layout = is_v ? c.format().v_layout() : c.format().k_layout();
      const double half_step = 1.0 / ((1 << part.bits) - 1) + 2e-2;
      const int64_t dim = is_v ? c.format().head_dim_v : c.format().head_dim;
      for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
        for (int64_t token = 0; token < spec.page_size; ++token) {
          for (int64_t d = 0; d < dim; ++d) {
            const double error = c.restored(is_v, i, token, head, d) - c.original(is_v, i, token, head, d);
            worst = std::max(worst, std::isnan(error) ? INFINITY : std::fabs(error) / half_step);
          }
        }
        const uint8_t* record = c.record(is_v, i, head);
        const auto zeros = [&](int64_t from, int64_t to) {
          clear = clear && std::all_of(record + from, record + to, [](uint8_t byte) { return byte == 0; });
        };
        zeros(spec.page_size * layout.row_bytes, layout.scale_offset);
        zeros(layout.scale_offset + layout.num_scales * 2, layout.min_offset);
        zeros(layout.min_offset + layout.num_scales * 2, layout.record_bytes);
      }
    }
  }
  emu::expect(worst <= 1, std::to_string(c.num_packed()) + " pages read back, worst " + std::to_string(worst));
  emu::expect(clear, "zeros between the parts of records");
}

// Attends over the records that it makes.
auto over(const QuantFormat& format) {
  return [format](const std::string& what, const test::Spec& spec, int num_sms) {
    Case(spec, format, num_sms, [&](const Case& c) { check_records(c, spec); }).attend(what);
  };
}

}  // namespace
}  // namespace kvk

int main() {
  using namespace kvk;
  return emu::run_tests([] {
    run_even_cases("KIVI", over(QuantFormat{32, 64, 64, {2, 32, true, 0}, {2, 32, false, 0}}));
    run_odd_cases("8 and 3 bits, groups of 17", 34, over(QuantFormat{34, 40, 72, {8, 40, false, 0}, {3, 17, true, 0}}));
  });
}
