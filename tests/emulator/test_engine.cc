// examples/cpp_engine on a card: its loop through the C++ face with a raw stream, over the emulator.
#include "cpp_engine/loop.h"

#include "cpu/backend.h"
#include "cuda/backend.h"
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/record_kernels.h"
#include "kvk/device/append_kv.cuh"
#include "kvk/device/quant.cuh"

KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<2>);
KVK_EMULATED_KERNEL(kvk::device::quantize_kernel<kvk::device::QuantCoding<kvk::device::bf16, 8, true, 0>>);
KVK_EMULATED_KERNEL(kvk::device::quantize_kernel<kvk::device::QuantCoding<kvk::device::bf16, 8, false, 0>>);
KVK_RECORD_DECODE(bf16, 32, 32, 1, 0, false, QuantPages<8, 16, true, false, 8, 32, false, false>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 32>);

// The backends: the emulator in the place of the driver, and nothing on the CPU.
namespace kvk {
namespace {

void* const kStream = reinterpret_cast<void*>(0x5eed);
int appended = 0, packed = 0, attended = 0;  // calls that came with the stream of the test

int with_the_stream(const Context& context) { return context.cuda_stream == kStream; }

[[noreturn]] void unexpected() { throw Error("a call went to a backend that this test does not have"); }

}  // namespace

const char* cpu_level() { return "emulator"; }
const char* version() { return "emulator"; }

namespace cuda {

void paged_attention(const char*, const PagedProblem& problem, int64_t list_entries, Device, const Context& context) {
  attended += with_the_stream(context);
  emu::EmulatorLauncher launcher(1);
  emu::EmulatorWorkspace workspace;
  launch_paged_attention(problem, list_entries, launcher, workspace);
}
void append_kv(const AppendKvArgs& args, const Context& context) {
  appended += with_the_stream(context);
  emu::EmulatorLauncher launcher(1);
  launch_append_kv(args, launcher);
}
void quantize_pages(const QuantizePagesArgs& args, const Context& context) {
  packed += with_the_stream(context);
  emu::EmulatorLauncher launcher(1);
  launch_quantize_pages(args, launcher);
}
void dequantize_pages(const DequantizePagesArgs&, const Context&) { unexpected(); }
void quantize(const QuantizeArgs&, const Context&) { unexpected(); }
void dequantize(const DequantizeArgs&, const Context&) { unexpected(); }
void read_memory(Device, void*, void*, const void*, size_t) { unexpected(); }

}  // namespace cuda

namespace cpu {

void paged_attention(const PagedProblem&, Threads&) { unexpected(); }
void append_kv(const AppendKvArgs&, Threads&) { unexpected(); }
void quantize_pages(const QuantizePagesArgs&, Threads&) { unexpected(); }
void dequantize_pages(const DequantizePagesArgs&, Threads&) { unexpected(); }
void quantize(const QuantizeArgs&, Threads&) { unexpected(); }
void dequantize(const DequantizeArgs&, Threads&) { unexpected(); }

}  // namespace cpu

namespace {

template <class T>
class EmulatedArray : public emu::DeviceArray<T> {
 public:
  EmulatedArray(const std::vector<T>& values, bool written)
      : emu::DeviceArray<T>(values, written ? emu::Use::in_out : emu::Use::input) {}
};

// Requests of 40, 29 and 18 tokens at the end, over pages of 16: records and a dense page in each.
void decode_loop() {
  constexpr engine::Setup setup = {4, 2, {16, 32, 32, {8, 16, true, 0}, {8, 32, false, 0}}, 3, 40, 11};
  Context context;
  context.cuda_stream = kStream;
  const double worst = engine::decode_loop<engine::BFloat16, EmulatedArray>(setup, {DeviceType::cuda, 0}, context);
  emu::expect(appended == setup.num_steps && attended == setup.num_steps && packed == 40 / 16 + 29 / 16 + 18 / 16,
              "every call came with the raw stream");
  emu::expect(worst < 1.5e-2, "largest error " + std::to_string(worst));
}

}  // namespace
}  // namespace kvk

int main() { return kvk::emu::run_tests(kvk::decode_loop); }
