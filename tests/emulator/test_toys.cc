// The toy kernels against float64. KVK_TOY_DEFECT seeds a mistake, which must make this program fail (mutation.py).
#include <cstdlib>

#include "emulator/harness.h"
#include "emulator/kernels/toy_decode.cuh"
#include "emulator/kernels/toy_hadamard.cuh"
#include "emulator/kernels/toy_wgmma.cuh"

namespace kvk::device {
namespace {

using emu::DeviceArray;
using emu::expect;

int seeded_defect() {
  const char* set = std::getenv("KVK_TOY_DEFECT");
  return set ? std::atoi(set) : 0;
}

std::vector<bf16> random_bf16(size_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<bf16> values(n);
  for (bf16& x : values) x = from_float<bf16>(normal(random));
  return values;
}

// NaN counts as an endless error.
double error_of(double got, double want) { return std::isnan(got) ? INFINITY : std::fabs(got - want); }

void expect_below(double worst, double limit, const std::string& what) {
  expect(worst < limit, what + ": worst error " + std::to_string(worst));
}

// ---------------------------------------------------------------------------------------------- hadamard
void test_hadamard(int defect) {
  const int rows = 37;
  std::mt19937 random(1);
  const std::vector<bf16> in = random_bf16(size_t(rows) * 128, random);
  const DeviceArray<bf16> device_in(in), device_out(in.size());
  const ToyHadamardParams p = {device_in.data(), device_out.data(), rows, 0.08838834764f, defect};
  KVK_EMU_LAUNCH((emu::LaunchConfig{{(rows + 3) / 4}, {128}}), p, toy_hadamard_kernel<bf16>);
  const std::vector<bf16> out = device_out.host();
  double worst = 0;
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < 128; j++) {
      double sum = 0;
      for (int k = 0; k < 128; k++) sum += (__builtin_popcount(j & k) & 1 ? -1 : 1) * double(to_float(in[i * 128 + k]));
      worst = std::max(worst, error_of(to_float(out[i * 128 + j]), sum * 0.08838834764));
    }
  }
  expect_below(worst, 0.02, "hadamard, 37 rows of 128");
}

// ---------------------------------------------------------------------------------------------- decode
struct DecodeCase {
  int kv_heads;
  std::vector<int> lens;
  int splits;
};

void test_decode(const DecodeCase& c, int defect) {
  using Config = ToyDecodeConfig;
  constexpr int D = Config::kDim, P = Config::kPage, G = Config::kGroup;
  const int batch = int(c.lens.size()), heads = c.kv_heads * G;
  const int longest = *std::max_element(c.lens.begin(), c.lens.end());
  const int max_pages = (longest + P - 1) / P, pages = batch * max_pages + 3;
  std::mt19937 random(7);
  const std::vector<bf16> q = random_bf16(size_t(batch) * heads * D, random);
  const bf16 nan = {0x7fff};
  std::vector<bf16> k(size_t(pages) * P * c.kv_heads * D, nan), v(k);         // slots past a request's end hold NaN
  std::vector<int> order(pages), table(size_t(batch) * max_pages, 0x3fffff);  // unused entries are wild
  for (int i = 0; i < pages; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  const auto row_of = [&](int b, int token, int h) {
    return ((size_t(table[b * max_pages + token / P]) * P + token % P) * c.kv_heads + h) * D;
  };
  std::normal_distribution<float> normal;
  for (int b = 0; b < batch; b++) {
    for (int i = 0; i * P < c.lens[b]; i++) table[b * max_pages + i] = order[b * max_pages + i];
    for (int token = 0; token < c.lens[b]; token++) {
      for (int h = 0; h < c.kv_heads; h++) {
        for (int d = 0; d < D; d++) {
          k[row_of(b, token, h) + d] = from_float<bf16>(normal(random));
          v[row_of(b, token, h) + d] = from_float<bf16>(normal(random));
        }
      }
    }
  }
  const size_t rows = size_t(batch) * heads;
  const DeviceArray<bf16> device_q(q), device_k(k), device_v(v), device_out(rows * D);
  const DeviceArray<int> device_table(table), device_lens(c.lens);
  const DeviceArray<float> part_out(rows * c.splits * D), part_state(rows * c.splits * 2);
  const double scale = 1 / std::sqrt(double(D));
  const ToyDecodeParams p = {device_q.data(),
                             device_k.data(),
                             device_v.data(),
                             device_table.data(),
                             device_lens.data(),
                             part_out.data(),
                             part_state.data(),
                             c.kv_heads,
                             max_pages,
                             c.splits,
                             float(scale * 1.4426950408889634),
                             defect};
  const emu::Dim3 grid(c.splits, c.kv_heads, batch);
  KVK_EMU_LAUNCH((emu::LaunchConfig{grid, {Config::kThreads}, Config::kSmemBytes}), p, toy_decode_kernel<Config>);
  const ToyCombineParams combine = {part_out.data(), part_state.data(), device_out.data(), c.splits, p.scale_log2};
  KVK_EMU_LAUNCH((emu::LaunchConfig{{unsigned(rows)}, {D}}), combine, toy_combine_kernel<D>);
  const std::vector<bf16> out = device_out.host();
  double worst = 0;
  for (int b = 0; b < batch; b++) {
    for (int h = 0; h < heads; h++) {
      std::vector<double> score(c.lens[b]), want(D, 0.0);
      double max = -INFINITY, sum = 0;
      for (int token = 0; token < c.lens[b]; token++) {
        double dot = 0;
        for (int d = 0; d < D; d++) {
          dot += double(to_float(q[(size_t(b) * heads + h) * D + d])) * to_float(k[row_of(b, token, h / G) + d]);
        }
        score[token] = dot * scale;
        max = std::max(max, score[token]);
      }
      for (int token = 0; token < c.lens[b]; token++) {
        const double weight = std::exp(score[token] - max);
        sum += weight;
        for (int d = 0; d < D; d++) want[d] += weight * to_float(v[row_of(b, token, h / G) + d]);
      }
      for (int d = 0; d < D; d++) {
        worst = std::max(worst, error_of(to_float(out[(size_t(b) * heads + h) * D + d]), sum > 0 ? want[d] / sum : 0));
      }
    }
  }
  expect_below(worst, 4e-3, "decode, longest " + std::to_string(longest) + ", splits " + std::to_string(c.splits));
}

// ---------------------------------------------------------------------------------------------- wgmma
#if KVK_HAS_WGMMA

TensorMap map_of(const bf16* base, uint64_t rows, uint64_t columns, uint32_t swizzle) {
  TensorMap map;
  const uint32_t box_rows = uint32_t(rows);
  emu::encode_tensor_map(&map, {base, 2, 2, {columns, rows}, {2, columns * 2}, {64, box_rows}, swizzle});
  return map;
}

// Worst error of out [64, 128] against a [64, k] times b, where b(n, k) gives its element.
template <class B>
double product_error(const std::vector<float>& out, const std::vector<bf16>& a, int k, B b) {
  double worst = 0;
  for (int i = 0; i < 64; i++) {
    for (int j = 0; j < 128; j++) {
      double sum = 0;
      for (int x = 0; x < k; x++) sum += double(to_float(a[i * k + x])) * to_float(b(j, x));
      worst = std::max(worst, error_of(out[i * 128 + j], sum));
    }
  }
  return worst;
}

void test_gemm(int k, int defect) {
  using Config = ToyGemmConfig;
  std::mt19937 random(3);
  const std::vector<bf16> a = random_bf16(size_t(64) * k, random), b = random_bf16(size_t(128) * k, random);
  const DeviceArray<bf16> device_a(a), device_b(b);
  const DeviceArray<float> out(64 * 128);
  const uint32_t swizzle = defect == 44 ? 0 : 128;  // 44: the maps do not swizzle
  const ToyGemmParams p = {map_of(device_a.data(), 64, k, swizzle), map_of(device_b.data(), 128, k, swizzle),
                           out.data(), k, defect};
  KVK_EMU_LAUNCH((emu::LaunchConfig{{1}, {Config::kThreads}, Config::kSmemBytes}), p, toy_gemm_kernel<Config>);
  const double worst = product_error(out.host(), a, k, [&](int n, int x) { return b[n * k + x]; });
  expect_below(worst, 1e-3, "wgmma, TMA, mbarriers, k " + std::to_string(k));
}

void test_store_gemm(int defect) {
  std::mt19937 random(4);
  const std::vector<bf16> a = random_bf16(64 * 64, random), b = random_bf16(128 * 64, random);
  const DeviceArray<bf16> device_a(a), device_b(b);
  const DeviceArray<float> out(64 * 128);
  const ToyStoreParams p = {device_a.data(), device_b.data(), out.data(), defect};
  KVK_EMU_LAUNCH((emu::LaunchConfig{{1}, {128}, 192 * 128}), p, toy_store_gemm_kernel<bf16>);
  const double worst = product_error(out.host(), a, 64, [&](int n, int x) { return b[n * 64 + x]; });
  expect_below(worst, 1e-3, "wgmma from ordinary stores");
}

void test_pv(int defect) {
  std::mt19937 random(5);
  const std::vector<bf16> p = random_bf16(64 * 64, random), v = random_bf16(64 * 128, random);
  const DeviceArray<bf16> device_p(p), device_v(v);
  const DeviceArray<float> out(64 * 128);
  const ToyStoreParams params = {device_p.data(), device_v.data(), out.data(), defect};
  KVK_EMU_LAUNCH((emu::LaunchConfig{{1}, {128}, 64 * 256}), params, toy_pv_kernel<bf16>);
  const double worst = product_error(out.host(), p, 64, [&](int n, int x) { return v[x * 128 + n]; });
  expect_below(worst, 1e-3, "wgmma, A in registers, B MN-major");
}

#endif

void run_all(int defect) {
  const bool decode = defect < 30, hadamard = defect == 0 || (defect >= 30 && defect < 40);
  if (hadamard) test_hadamard(defect);
  // Three tiles a split and more: each pipeline stage comes around.
  if (decode) test_decode({1, {77, 330}, 2}, defect);
  if (defect == 0) test_decode({2, {64, 1, 0}, 3}, defect);
#if KVK_HAS_WGMMA
  const bool wgmma = defect == 0 || defect >= 40;
  if (wgmma && defect != 49) test_gemm(320, defect);
  if (wgmma) test_store_gemm(defect);
  if (defect == 0) test_gemm(64, defect);
  if (defect == 0) test_pv(defect);
#endif
}

}  // namespace
}  // namespace kvk::device

int main() {
  return kvk::emu::run_tests([] { kvk::device::run_all(kvk::device::seeded_defect()); });
}
