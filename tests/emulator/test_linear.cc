// Normalised linear attention on CUDA: libkvk's launch code over the emulator, against whole matrices in double.
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"
#include "kvk/device/linear.cuh"
#include "kvk/device/linear_sums.cuh"

KVK_EMULATED_KERNEL(kvk::device::linear_forward_kernel<kvk::device::LinearConfig<kvk::device::bf16, 32, false>>);
KVK_EMULATED_KERNEL(kvk::device::linear_forward_kernel<kvk::device::LinearConfig<kvk::device::bf16, 32, true>>);
KVK_EMULATED_KERNEL(kvk::device::linear_sums_kernel<kvk::device::bf16>);

namespace kvk {
namespace {

using test::Array;
using test::element;

constexpr int64_t kDk = 24, kDv = 32;
constexpr double kScale = 0.5, kEps = 0.25;

// What an output is apart from what it should be, at the most; NaN counts.
class Worst {
 public:
  void see(double got, double want) {
    value_ = std::max(value_, std::isnan(got - want) ? INFINITY : std::fabs(got - want) / (1 + std::fabs(want)));
  }
  void expect(double limit, const std::string& what) const {
    emu::expect(value_ <= limit, what + ": worst error " + std::to_string(value_));
  }

 private:
  double value_ = 0;
};

// A matrix of one head, rows x columns.
struct Matrix {
  int64_t columns;
  std::vector<double> x;
  Matrix(int64_t rows, int64_t width) : columns(width), x(static_cast<size_t>(rows * width)) {}
  double& operator()(int64_t r, int64_t c) { return x[static_cast<size_t>(r * columns + c)]; }
};

// Positive elements: no denominator is near 0.
Array positive(std::initializer_list<int64_t> shape, test::Random& random, DType dtype = DType::bf16) {
  Array array = Array::random(dtype, shape, random);
  for (int64_t i = 0; i < array.view().numel(); ++i) array.set(i, 0.1f * float(i % 7) + 0.1f);
  return array;
}

// One head of packed sequences of `lengths`, and tokens of none behind them; results and gradients.
void test_linear(const std::vector<int64_t>& lengths, bool causal, int64_t block_size, const std::string& what) {
  constexpr int64_t kUnowned = 3;
  const int64_t count = static_cast<int64_t>(lengths.size());
  std::vector<int32_t> starts = {0};
  for (const int64_t n : lengths) starts.push_back(starts.back() + static_cast<int32_t>(n));
  const int64_t tokens = starts.back() + kUnowned;
  test::Random random(11);
  const Array q = Array::random(DType::bf16, {1, tokens, 1, kDk}, random),
              q_den = positive({1, tokens, 1, kDk}, random);
  const Array k = Array::random(DType::bf16, {1, tokens, 1, kDk}, random),
              k_den = positive({1, tokens, 1, kDk}, random);
  const Array v = Array::random(DType::bf16, {1, tokens, 1, kDv}, random);
  const Array grad = Array::random(DType::bf16, {1, tokens, 1, kDv}, random);
  const Array grad_den = Array::random(DType::f32, {1, tokens, 1}, random);
  const Array state = Array::random(DType::f32, {count, 1, kDk, kDv}, random);
  const Array grad_state = Array::random(DType::f32, {count, 1, kDk, kDv}, random);
  const Array z = positive({count, 1, kDk}, random, DType::f32),
              grad_z = Array::random(DType::f32, {count, 1, kDk}, random);
  const Array starts_array = Array::of(starts), den(DType::f32, {1, tokens, 1});
  OnDevice device;
  LinearAttentionBackwardArgs args;
  LinearAttentionArgs& in = args.forward;
  in.q = device(q.view());
  in.k = device(k.view());
  in.v = device(v.view());
  in.q_den = device(q_den.view());
  in.k_den = device(k_den.view());
  in.initial_state = device(state.view());
  in.initial_z = device(z.view());
  in.cu_seqlens = device(starts_array.view());
  in.causal = causal;
  in.block_size = block_size;
  in.scale = kScale;
  in.eps = kEps;
  in.out = device(v.view(), emu::Use::output);
  in.den = device(den.view(), emu::Use::output);
  in.final_state = device(state.view(), emu::Use::output);
  in.final_z = device(z.view(), emu::Use::output);
  args.grad_out = device(grad.view());
  args.grad_den = device(grad_den.view());
  args.grad_final_state = device(grad_state.view());
  args.grad_final_z = device(grad_z.view());
  args.grad_q = device(q.view(), emu::Use::output);
  args.grad_k = device(k.view(), emu::Use::output);
  args.grad_v = device(v.view(), emu::Use::output);
  args.grad_q_den = device(q.view(), emu::Use::output);
  args.grad_k_den = device(k.view(), emu::Use::output);
  args.grad_initial_state = device(state.view(), emu::Use::output);
  args.grad_initial_z = device(z.view(), emu::Use::output);
  emu::EmulatorLauncher launcher;
  emu::EmulatorWorkspace workspace;
  cuda::launch_linear_attention(in, launcher);
  cuda::launch_linear_attention_backward(args, launcher, workspace);

  Worst rows, exact;  // of bf16, of floats
  for (int64_t n = 0; n < count; ++n) {
    const int64_t first = starts[static_cast<size_t>(n)], length = lengths[static_cast<size_t>(n)];
    const auto at = [&](const Array& x, int64_t t, int64_t d) { return element(x.view(), {0, first + t, 0, d}); };
    const auto dot = [&](const Array& a, int64_t i, const Array& b, int64_t j, int64_t dim) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += at(a, i, d) * at(b, j, d);
      return sum;
    };
    const auto end = [&](int64_t t) { return causal ? std::min(length, (t / block_size + 1) * block_size) : length; };
    Matrix final(kDk, kDv), of_state(kDk, kDv), of_k(length, kDk), of_v(length, kDv), of_kd(length, kDk);
    std::vector<double> final_z(kDk), of_z(kDk);
    for (int64_t d = 0; d < kDk; ++d) {
      final_z[static_cast<size_t>(d)] = element(z.view(), {n, 0, d});
      of_z[static_cast<size_t>(d)] = element(grad_z.view(), {n, 0, d});
      for (int64_t c = 0; c < kDv; ++c) {
        final(d, c) = element(state.view(), {n, 0, d, c});
        of_state(d, c) = element(grad_state.view(), {n, 0, d, c});
      }
    }
    const Matrix initial = final, of_final = of_state;
    const std::vector<double> of_final_z = of_z;
    const auto s = [&](const Matrix& m, int64_t d, int64_t c) { return m.x[static_cast<size_t>(d * kDv + c)]; };
    for (int64_t j = 0; j < length; ++j) {  // what the gradients of the final states give
      for (int64_t d = 0; d < kDk; ++d) {
        final_z[static_cast<size_t>(d)] += at(k_den, j, d);
        of_kd(j, d) = of_final_z[static_cast<size_t>(d)];
        for (int64_t c = 0; c < kDv; ++c) {
          final(d, c) += at(k, j, d) * at(v, j, c);
          of_k(j, d) += s(of_final, d, c) * at(v, j, c);
          of_v(j, c) += s(of_final, d, c) * at(k, j, d);
        }
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      std::vector<double> num(kDv), seen(kDk), of_q(kDk);
      for (int64_t d = 0; d < kDk; ++d) {
        seen[static_cast<size_t>(d)] = element(z.view(), {n, 0, d});
        for (int64_t c = 0; c < kDv; ++c) num[static_cast<size_t>(c)] += kScale * at(q, i, d) * s(initial, d, c);
      }
      for (int64_t j = 0; j < end(i); ++j) {
        const double weight = kScale * dot(q, i, k, j, kDk);
        for (int64_t c = 0; c < kDv; ++c) num[static_cast<size_t>(c)] += weight * at(v, j, c);
        for (int64_t d = 0; d < kDk; ++d) seen[static_cast<size_t>(d)] += at(k_den, j, d);
      }
      double under = 0;
      for (int64_t d = 0; d < kDk; ++d) under += kScale * at(q_den, i, d) * seen[static_cast<size_t>(d)];
      exact.see(element(in.den, {0, first + i, 0}), under);
      double g = element(grad_den.view(), {0, first + i, 0});
      for (int64_t c = 0; c < kDv; ++c) {
        const double out = num[static_cast<size_t>(c)] / (under + kEps);
        rows.see(element(in.out, {0, first + i, 0, c}), out);
        g -= at(grad, i, c) * out / (under + kEps);
      }
      const double factor = kScale / (under + kEps);
      for (int64_t d = 0; d < kDk; ++d) {
        for (int64_t c = 0; c < kDv; ++c) {
          of_q[static_cast<size_t>(d)] += factor * at(grad, i, c) * s(initial, d, c);
          of_state(d, c) += factor * at(q, i, d) * at(grad, i, c);
        }
        rows.see(element(*args.grad_q_den, {0, first + i, 0, d}), kScale * g * seen[static_cast<size_t>(d)]);
        of_z[static_cast<size_t>(d)] += kScale * g * at(q_den, i, d);
      }
      for (int64_t j = 0; j < end(i); ++j) {
        const double of_weight = factor * dot(grad, i, v, j, kDv), weight = factor * dot(q, i, k, j, kDk);
        for (int64_t d = 0; d < kDk; ++d) {
          of_q[static_cast<size_t>(d)] += of_weight * at(k, j, d);
          of_k(j, d) += of_weight * at(q, i, d);
          of_kd(j, d) += kScale * g * at(q_den, i, d);
        }
        for (int64_t c = 0; c < kDv; ++c) of_v(j, c) += weight * at(grad, i, c);
      }
      for (int64_t d = 0; d < kDk; ++d)
        rows.see(element(args.grad_q, {0, first + i, 0, d}), of_q[static_cast<size_t>(d)]);
    }
    for (int64_t d = 0; d < kDk; ++d) {
      exact.see(element(in.final_z, {n, 0, d}), final_z[static_cast<size_t>(d)]);
      exact.see(element(*args.grad_initial_z, {n, 0, d}), of_z[static_cast<size_t>(d)]);
      for (int64_t c = 0; c < kDv; ++c) {
        exact.see(element(in.final_state, {n, 0, d, c}), final(d, c));
        exact.see(element(*args.grad_initial_state, {n, 0, d, c}), of_state(d, c));
      }
      for (int64_t j = 0; j < length; ++j) {
        rows.see(element(args.grad_k, {0, first + j, 0, d}), of_k(j, d));
        rows.see(element(*args.grad_k_den, {0, first + j, 0, d}), of_kd(j, d));
      }
    }
    for (int64_t j = 0; j < length; ++j) {
      for (int64_t c = 0; c < kDv; ++c) rows.see(element(args.grad_v, {0, first + j, 0, c}), of_v(j, c));
    }
  }
  for (int64_t t = tokens - kUnowned; t < tokens; ++t) {
    exact.see(element(in.den, {0, t, 0}), 0);
    for (const Tensor& x : {in.out, args.grad_q, args.grad_k, args.grad_v, *args.grad_q_den, *args.grad_k_den}) {
      exact.see(element(x, {0, t, 0, 0}), 0);
    }
  }
  exact.expect(5e-6, what + ", floats");
  rows.expect(2e-2, what + ", rows");
}

}  // namespace
}  // namespace kvk

int main() {
  return kvk::emu::run_tests([] {
    // Four chunks, one, none, and one of a single token.
    kvk::test_linear({200, 64, 0, 1}, true, 1, "causal");
    kvk::test_linear({140, 9}, true, 7, "blocks of 7");
    kvk::test_linear({230, 31}, true, 100, "blocks of 100");
    kvk::test_linear({150, 1}, false, 1, "all");
  });
}
