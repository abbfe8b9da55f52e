// examples/cpp_engine on a card: its steps, through the C++ face with a raw stream, over the emulator. All pages are dense here.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "cpp_engine/cache.h"
#include "cpp_engine/step.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "kvk/device/append_kv.cuh"
#include "kvk/device/paged_decode.cuh"

KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<2>);
KVK_EMULATED_KERNEL(kvk::device::paged_decode_kernel<kvk::device::PagedDecodeConfig<kvk::device::bf16, 32, 32, 1, 0>>);
KVK_EMULATED_KERNEL(kvk::device::merge_splits_kernel<kvk::device::bf16, 32>);

// The backends: the emulator in the place of the driver, and nothing on the CPU.
namespace kvk {
namespace {

int on_the_stream = 0;  // calls that came with the stream of the test
void* const kStream = reinterpret_cast<void*>(0x5eed);

void note(const Context& context) { on_the_stream += context.cuda_stream == kStream; }

[[noreturn]] void unexpected() { throw Error("a call went to a backend that this test does not have"); }

}  // namespace

const char* cpu_level() { return "emulator"; }
const char* version() { return "emulator"; }

namespace cuda {

void paged_attention(const char*, const PagedProblem& problem, int64_t list_entries, Device, const Context& context) {
  note(context);
  emu::EmulatorLauncher launcher(1);
  emu::EmulatorWorkspace workspace;
  launch_paged_attention(problem, list_entries, launcher, workspace);
}
void append_kv(const AppendKvArgs& args, const Context& context) {
  note(context);
  emu::EmulatorLauncher launcher(1);
  launch_append_kv(args, launcher);
}
void read_memory(Device, void*, void*, const void*, size_t) { unexpected(); }

}  // namespace cuda

namespace cpu {

void paged_attention(const PagedProblem&, Threads&) { unexpected(); }
void append_kv(const AppendKvArgs&, Threads&) { unexpected(); }

}  // namespace cpu

// The example's ops that this test does not come to.
void quantize_pages(const QuantizePagesArgs&, const Context&) { unexpected(); }
void quant_decode(const QuantDecodeArgs&, const Context&) { unexpected(); }

namespace {

using engine::view;

constexpr engine::Shape kShape = {4, 2, 32, 8, DType::bf16};
constexpr int32_t kRequests = 3;
constexpr int kSteps = 40, kJoin = 11;
const Device kCard = {DeviceType::cuda, 0};

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<double>(value);
}

using Rows = std::vector<uint16_t>;

// Largest error of the last step's rows of one request against the sums in double over all its keys.
double error_of(const Rows& q, const std::vector<Rows>& keys, const std::vector<Rows>& values, const Rows& out,
                int request) {
  const auto dim = static_cast<size_t>(kShape.head_dim),
             group = static_cast<size_t>(kShape.num_q_heads / kShape.num_kv_heads);
  double worst = 0;
  for (size_t head = 0; head < static_cast<size_t>(kShape.num_q_heads); ++head) {
    const size_t row = (static_cast<size_t>(request * kShape.num_q_heads) + head) * dim;
    const size_t kv = (static_cast<size_t>(request * kShape.num_kv_heads) + head / group) * dim;
    std::vector<double> want(dim);
    double total = 0;
    for (size_t t = static_cast<size_t>(request * kJoin); t < keys.size(); ++t) {
      double score = 0;
      for (size_t i = 0; i < dim; ++i) score += from_bf16(q[row + i]) * from_bf16(keys[t][kv + i]);
      const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
      total += weight;
      for (size_t i = 0; i < dim; ++i) want[i] += weight * from_bf16(values[t][kv + i]);
    }
    for (size_t i = 0; i < dim; ++i) worst = std::max(worst, std::fabs(from_bf16(out[row + i]) - want[i] / total));
  }
  return worst;
}

void decode_loop() {
  const auto [num_q_heads, num_kv_heads, dim, page_size, dtype] = kShape;
  const int32_t num_pages = kRequests * (kSteps / static_cast<int32_t>(page_size) + 1);
  const size_t pool = static_cast<size_t>(num_pages * page_size * num_kv_heads * dim);
  const uint16_t nan = 0x7fff;
  const emu::DeviceArray<uint16_t> k_pages(Rows(pool, nan), emu::Use::in_out),
      v_pages(Rows(pool, nan), emu::Use::in_out);
  const engine::Layer layer = {view(k_pages.data(), dtype, kCard, {num_pages, page_size, num_kv_heads, dim}),
                               view(v_pages.data(), dtype, kCard, {num_pages, page_size, num_kv_heads, dim}),
                               {}};
  engine::PageTables tables(kShape, kRequests, num_pages, 0);
  Context context;
  context.cuda_stream = kStream;

  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto rows = [&](int64_t heads) {
    Rows x(static_cast<size_t>(kRequests * heads * dim));
    for (uint16_t& value : x) value = to_bf16(normal(random));
    return x;
  };
  std::vector<Rows> all_k, all_v;
  Rows all_q, result;
  for (int step = 0; step < kSteps; ++step) {
    all_q = rows(num_q_heads);
    all_k.push_back(rows(num_kv_heads));
    all_v.push_back(rows(num_kv_heads));
    const emu::DeviceArray<int64_t> slots(
        tables.next_slots(static_cast<size_t>(std::min(kRequests, step / kJoin + 1))));
    const emu::DeviceArray<int32_t> table(tables.table()), lens(tables.lens());
    const emu::DeviceArray<uint16_t> q(all_q), k(all_k.back()), v(all_v.back()), out(all_q.size());
    const emu::DeviceArray<float> lse(static_cast<size_t>(kRequests * num_q_heads));
    const auto max_pages = static_cast<int64_t>(tables.max_pages());
    engine::run_step(layer,
                     {.q = view(q.data(), dtype, kCard, {kRequests, num_q_heads, dim}),
                      .k = view(k.data(), dtype, kCard, {kRequests, num_kv_heads, dim}),
                      .v = view(v.data(), dtype, kCard, {kRequests, num_kv_heads, dim}),
                      .slots = view(slots.data(), DType::i64, kCard, {kRequests}),
                      .packing = {},
                      .table = view(table.data(), DType::i32, kCard, {kRequests, max_pages}),
                      .lens = view(lens.data(), DType::i32, kCard, {kRequests}),
                      .out = view(out.data(), dtype, kCard, {kRequests, num_q_heads, dim}),
                      .lse = view(lse.data(), DType::f32, kCard, {kRequests, num_q_heads})},
                     context);
    result = out.host();
  }
  emu::expect(on_the_stream == 2 * kSteps, "every call came with the raw stream");
  for (int request = 0; request < kRequests; ++request) {
    const double worst = error_of(all_q, all_k, all_v, result, request);
    emu::expect(worst < 1.5e-2, "request " + std::to_string(request) + ": largest error " + std::to_string(worst));
  }
}

}  // namespace
}  // namespace kvk

int main() { return kvk::emu::run_tests(kvk::decode_loop); }
