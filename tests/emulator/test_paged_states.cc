// append_kv, merge_states and its gradient on CUDA: libkvk's launch code over the emulator.
#include <limits>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "kvk/device/append_kv.cuh"
#include "kvk/device/merge_states.cuh"

KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<2>);
KVK_EMULATED_KERNEL(kvk::device::append_kv_kernel<4>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_kernel<float>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::merge_states_backward_kernel<float>);

namespace kvk {
namespace {

using emu::DeviceArray;

template <class T>
Tensor tensor(const DeviceArray<T>& array, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.data = array.data();
  t.dtype = dtype;
  t.device = {DeviceType::cuda, 0};
  for (const int64_t n : shape) t.shape[t.ndim++] = n;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

// T tokens into pools of 5 pages; `offset` elements of misalignment take the path of single elements.
template <class Word>
void test_append(DType dtype, int64_t head_dim, bool heads_first, int64_t offset, const std::string& what) {
  constexpr int64_t kPages = 5, kPageSize = 3, kHeads = 2, kTokens = 7;
  std::mt19937 random(3);
  std::vector<Word> rows(static_cast<size_t>(kTokens * kHeads * head_dim + offset));
  for (Word& x : rows) x = static_cast<Word>(random());
  std::vector<Word> pool(static_cast<size_t>(kPages * kPageSize * kHeads * head_dim));
  for (Word& x : pool) x = static_cast<Word>(random());
  const std::vector<int64_t> slots = {4, -1, 0, 14, 15, 7, int64_t{1} << 40};  // the last ones lie past the pool
  const DeviceArray<Word> k(rows), v(rows);
  const DeviceArray<Word> k_pages(pool, emu::Use::in_out, "k_pages"), v_pages(pool, emu::Use::in_out, "v_pages");
  const DeviceArray<int64_t> slot_mapping(slots);

  AppendKvArgs args;
  args.k = tensor(k, dtype, {kTokens, kHeads, head_dim});
  args.k.data = k.data() + offset;
  args.v = args.k;
  args.v.data = v.data() + offset;
  args.k_pages = heads_first ? tensor(k_pages, dtype, {kPages, kHeads, kPageSize, head_dim})
                             : tensor(k_pages, dtype, {kPages, kPageSize, kHeads, head_dim});
  if (heads_first) {
    std::swap(args.k_pages.shape[1], args.k_pages.shape[2]);
    std::swap(args.k_pages.stride[1], args.k_pages.stride[2]);
  }
  args.v_pages = args.k_pages;
  args.v_pages.data = v_pages.data();
  args.slot_mapping = tensor(slot_mapping, DType::i64, {kTokens});
  emu::EmulatorLauncher launcher;
  cuda::launch_append_kv(args, launcher);

  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t slot = slots[static_cast<size_t>(t)];
    if (slot < 0 || slot >= kPages * kPageSize) continue;
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t to = slot / kPageSize * args.k_pages.stride[0] + slot % kPageSize * args.k_pages.stride[1] +
                         h * args.k_pages.stride[2];
      for (int64_t d = 0; d < head_dim; ++d) {
        pool[static_cast<size_t>(to + d)] = rows[static_cast<size_t>(offset + (t * kHeads + h) * head_dim + d)];
      }
    }
  }
  emu::expect(k_pages.host() == pool && v_pages.host() == pool, what);
}

constexpr int64_t kParts = 3, kTokens = 3, kHeads = 2, kDim = 40;
constexpr int64_t kRows = kTokens * kHeads;

struct States {
  std::vector<float> parts, lse;

  States() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < kParts * kRows * kDim; ++i) parts.push_back(normal(random));
    for (int64_t i = 0; i < kParts * kRows; ++i) lse.push_back(100.0f + 3 * normal(random));
    const float inf = std::numeric_limits<float>::infinity();
    lse[0] = -inf;  // one part of row 0 is empty, and its values are NaN
    for (int64_t d = 0; d < kDim; ++d) parts[static_cast<size_t>(d)] = NAN;
    lse[kRows] = inf;                                                                     // another counts as empty
    for (int64_t i = 0; i < kParts; ++i) lse[static_cast<size_t>(i * kRows + 1)] = -inf;  // row 1 saw nothing
    lse[2] = NAN;                                                                         // row 2 is NaN
  }
  static bool saw(float x) { return !std::isinf(x); }
  double merged(int64_t row) const {
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < kParts; ++i) {
      const double x = lse[static_cast<size_t>(i * kRows + row)];
      if (std::isnan(x)) return NAN;
      if (!std::isinf(x)) max = std::max(max, x);
    }
    if (max == -INFINITY) return max;
    for (int64_t i = 0; i < kParts; ++i) {
      const double x = lse[static_cast<size_t>(i * kRows + row)];
      if (!std::isinf(x)) sum += std::exp(x - max);
    }
    return max + std::log(sum);
  }
  double weight(int64_t i, int64_t row) const {
    const double x = lse[static_cast<size_t>(i * kRows + row)];
    return std::isinf(x) ? 0 : std::exp(x - merged(row));
  }
  double part(int64_t i, int64_t row, int64_t d) const {
    return weight(i, row) == 0 ? 0 : parts[static_cast<size_t>((i * kRows + row) * kDim + d)];
  }
  double out(int64_t row, int64_t d) const {
    if (std::isnan(merged(row))) return NAN;
    double sum = 0;
    for (int64_t i = 0; i < kParts; ++i) sum += weight(i, row) * part(i, row, d);
    return sum;
  }
};

double error(double got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : INFINITY;
  if (std::isinf(want)) return got == want ? 0 : INFINITY;
  return std::isnan(got) ? INFINITY : std::fabs(got - want);
}

void test_merge() {
  const States states;
  const DeviceArray<float> parts(states.parts), lse(states.lse), out(kRows * kDim), merged(kRows);
  emu::EmulatorLauncher launcher;
  cuda::launch_merge_states(
      {tensor(parts, DType::f32, {kParts, kTokens, kHeads, kDim}), tensor(lse, DType::f32, {kParts, kTokens, kHeads}),
       tensor(out, DType::f32, {kTokens, kHeads, kDim}), tensor(merged, DType::f32, {kTokens, kHeads})},
      launcher);
  const std::vector<float> got = out.host(), got_lse = merged.host();
  double worst = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    worst = std::max(worst, error(got_lse[static_cast<size_t>(row)], states.merged(row)) / 100);
    for (int64_t d = 0; d < kDim; ++d) {
      worst = std::max(worst, error(got[static_cast<size_t>(row * kDim + d)], states.out(row, d)));
    }
  }
  emu::expect(worst < 2e-6, "merge_states f32, empty and NaN parts: worst error " + std::to_string(worst));

  std::vector<device::bf16> narrow;
  for (const float x : states.parts) narrow.push_back(device::from_float<device::bf16>(x));
  const DeviceArray<device::bf16> parts16(narrow), out16(kRows * kDim);
  const DeviceArray<float> merged16(kRows);
  cuda::launch_merge_states(
      {tensor(parts16, DType::bf16, {kParts, kTokens, kHeads, kDim}),
       tensor(lse, DType::f32, {kParts, kTokens, kHeads}), tensor(out16, DType::bf16, {kTokens, kHeads, kDim}),
       tensor(merged16, DType::f32, {kTokens, kHeads})},
      launcher);
  const std::vector<device::bf16> got16 = out16.host();
  worst = 0;
  for (int64_t i = 0; i < kRows * kDim; ++i) {
    worst = std::max(worst, error(device::to_float(got16[static_cast<size_t>(i)]), states.out(i / kDim, i % kDim)));
  }
  emu::expect(worst < 0.03, "merge_states bf16: worst error " + std::to_string(worst));
}

void test_merge_backward() {
  const States states;
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  std::vector<float> grad(kRows * kDim), grad_lse(kRows);
  for (float& x : grad) x = normal(random);
  for (float& x : grad_lse) x = normal(random);
  const DeviceArray<float> g(grad), g_lse(grad_lse), parts(states.parts), lse(states.lse);
  const DeviceArray<float> to(kParts * kRows * kDim), to_lse(kParts * kRows);
  emu::EmulatorLauncher launcher;
  cuda::launch_merge_states_backward(
      {tensor(g, DType::f32, {kTokens, kHeads, kDim}), tensor(g_lse, DType::f32, {kTokens, kHeads}),
       tensor(parts, DType::f32, {kParts, kTokens, kHeads, kDim}), tensor(lse, DType::f32, {kParts, kTokens, kHeads}),
       tensor(to, DType::f32, {kParts, kTokens, kHeads, kDim}), tensor(to_lse, DType::f32, {kParts, kTokens, kHeads})},
      launcher);
  const std::vector<float> got = to.host(), got_lse = to_lse.host();
  double worst = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    if (std::isnan(states.merged(row))) continue;
    for (int64_t i = 0; i < kParts; ++i) {
      const double w = states.weight(i, row);
      double dot = grad_lse[static_cast<size_t>(row)];
      for (int64_t d = 0; d < kDim; ++d) {
        const double x = grad[static_cast<size_t>(row * kDim + d)];
        dot += x * (states.part(i, row, d) - states.out(row, d));
        worst = std::max(worst, error(got[static_cast<size_t>((i * kRows + row) * kDim + d)], w * x));
      }
      worst = std::max(worst, error(got_lse[static_cast<size_t>(i * kRows + row)], w == 0 ? 0 : w * dot));
    }
  }
  emu::expect(worst < 1e-5, "gradient of merge_states: worst error " + std::to_string(worst));
}

}  // namespace
}  // namespace kvk

int main() {
  return kvk::emu::run_tests([] {
    using kvk::DType;
    kvk::test_append<uint16_t>(DType::bf16, 64, false, 0, "append_kv of 16-bit rows, NHD");
    kvk::test_append<uint16_t>(DType::f16, 40, true, 0, "append_kv of 16-bit rows, HND");
    kvk::test_append<uint32_t>(DType::f32, 32, false, 0, "append_kv of f32 rows");
    kvk::test_append<uint16_t>(DType::bf16, 64, false, 3, "append_kv of rows off 16 bytes");
    kvk::test_merge();
    kvk::test_merge_backward();
  });
}
