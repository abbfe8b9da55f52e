// Lightning attention on CUDA: libkvk's launch code over the emulator, against the recurrence in double.
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"
#include "kvk/device/lightning.cuh"
#include "kvk/device/lightning_decay.cuh"
#include "kvk/device/lightning_decode.cuh"

KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decode_kernel<float>);
// Two stages of a chunk, and one.
KVK_EMULATED_KERNEL(kvk::device::lightning_forward_kernel<kvk::device::LightningConfig<kvk::device::bf16, 32>>);
KVK_EMULATED_KERNEL(kvk::device::lightning_forward_kernel<kvk::device::LightningConfig<kvk::device::f16, 64, true>>);
KVK_EMULATED_KERNEL(kvk::device::lightning_decay_kernel<kvk::device::LightningDecayConfig<kvk::device::bf16, 32>>);
KVK_EMULATED_KERNEL(kvk::device::sum_parts_kernel<256>);

namespace kvk {
namespace {

using test::Array;
using test::element;

// One head's S = exp(log) S + k v^T and scale * S^T q, in double.
class Recurrence {
 public:
  Recurrence(int64_t dk, int64_t dv) : dk_(dk), dv_(dv), state_(static_cast<size_t>(dk * dv)) {}
  double& state(int64_t d, int64_t c) { return state_[static_cast<size_t>(d * dv_ + c)]; }

  template <class Q, class K, class V>
  std::vector<double> step(double log, double scale, Q&& q, K&& k, V&& v) {
    std::vector<double> out(static_cast<size_t>(dv_));
    for (int64_t d = 0; d < dk_; ++d) {
      for (int64_t c = 0; c < dv_; ++c) {
        state(d, c) = std::exp(log) * state(d, c) + k(d) * v(c);
        out[static_cast<size_t>(c)] += scale * q(d) * state(d, c);
      }
    }
    return out;
  }

 private:
  int64_t dk_, dv_;
  std::vector<double> state_;
};

// The worst error so far; NaN counts.
struct Worst {
  double value = 0;
  void see(double got, double want) {
    value = std::max(value, std::isnan(got - want) ? INFINITY : std::fabs(got - want));
  }
};

void expect_close(const Worst& worst, double limit, const std::string& what) {
  emu::expect(worst.value <= limit, what + ": worst error " + std::to_string(worst.value));
}

void test_decode(DType dtype, int64_t dk, int64_t dv, bool per_row) {
  constexpr int64_t kBatch = 4, kHeads = 2, kSlots = 5;
  const std::vector<int32_t> named = {3, -1, 0, 4};
  test::Random random(3);
  const Array q = Array::random(dtype, {kBatch, kHeads, dk}, random);
  const Array k = Array::random(dtype, {kBatch, kHeads, dk}, random);
  const Array v = Array::random(dtype, {kBatch, kHeads, dv}, random);
  const Array pool = Array::random(DType::f32, {kSlots, kHeads, dk, dv}, random);
  const Array slots = Array::of(named);
  Array log =
      per_row ? Array::random(DType::f32, {kBatch, kHeads}, random) : Array::random(DType::f32, {kHeads}, random);
  for (int64_t i = 0; i < log.view().numel(); ++i) log.set(i, -std::fabs(log.view().ptr<const float>()[i]));
  const Array out(dtype, {kBatch, kHeads, dv});
  OnDevice device;
  const emu::DeviceArray<float> state(
      std::vector<float>(pool.view().ptr<float>(), pool.view().ptr<float>() + pool.view().numel()), emu::Use::in_out,
      "state");

  LightningDecodeArgs args = {device(q.view()),
                              device(k.view()),
                              device(v.view()),
                              pool.view(),
                              device(slots.view()),
                              device(log.view()),
                              0.5,
                              device(out.view(), emu::Use::output)};
  args.state.data = state.data();
  emu::EmulatorLauncher launcher;
  cuda::launch_lightning_decode(args, launcher);

  Worst worst_out, worst_state;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t slot = named[static_cast<size_t>(b)];
      std::vector<double> want(static_cast<size_t>(dv));
      if (slot >= 0) {
        Recurrence head(dk, dv);
        for (int64_t d = 0; d < dk; ++d) {
          for (int64_t c = 0; c < dv; ++c) head.state(d, c) = element(pool.view(), {slot, h, d, c});
        }
        want = head.step(
            per_row ? element(log.view(), {b, h}) : element(log.view(), {h}), 0.5,
            [&](int64_t d) { return element(q.view(), {b, h, d}); },
            [&](int64_t d) { return element(k.view(), {b, h, d}); },
            [&](int64_t c) { return element(v.view(), {b, h, c}); });
        for (int64_t d = 0; d < dk; ++d) {
          for (int64_t c = 0; c < dv; ++c) worst_state.see(element(args.state, {slot, h, d, c}), head.state(d, c));
        }
      }
      for (int64_t c = 0; c < dv; ++c) worst_out.see(element(args.out, {b, h, c}), want[static_cast<size_t>(c)]);
    }
  }
  for (int64_t slot : {1, 2}) {  // nobody's
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t d = 0; d < dk; ++d)
        worst_state.see(element(args.state, {slot, h, d, 0}), element(pool.view(), {slot, h, d, 0}));
    }
  }
  const std::string what = "decode " + std::to_string(dk) + " x " + std::to_string(dv);
  expect_close(worst_state, 2e-6, what + ", states");
  expect_close(worst_out, dtype == DType::f32 ? 2e-5 : 0.1, what + ", out");
}

// Packed sequences of `lengths`, and tokens of none behind them.
void test_forward(DType dtype, int64_t dk, int64_t dv, const std::vector<int64_t>& lengths, bool per_token,
                  int shared_per_block) {
  constexpr int64_t kHeads = 2, kUnowned = 3;
  const int64_t count = static_cast<int64_t>(lengths.size());
  std::vector<int32_t> starts = {0};
  for (const int64_t n : lengths) starts.push_back(starts.back() + static_cast<int32_t>(n));
  const int64_t tokens = starts.back() + kUnowned;
  test::Random random(5);
  const Array q = Array::random(dtype, {1, tokens, kHeads, dk}, random);
  const Array k = Array::random(dtype, {1, tokens, kHeads, dk}, random);
  const Array v = Array::random(dtype, {1, tokens, kHeads, dv}, random);
  const Array initial = Array::random(DType::f32, {count, kHeads, dk, dv}, random), starts_array = Array::of(starts);
  Array log =
      per_token ? Array::random(DType::f32, {1, tokens, kHeads}, random) : Array::random(DType::f32, {kHeads}, random);
  for (int64_t i = 0; i < log.view().numel(); ++i) log.set(i, -0.2f * std::fabs(log.view().ptr<const float>()[i]));
  const Array out(dtype, {1, tokens, kHeads, dv}), final(DType::f32, {count, kHeads, dk, dv});
  OnDevice device;
  const LightningArgs args = {device(q.view()),
                              device(k.view()),
                              device(v.view()),
                              device(log.view()),
                              0.25,
                              device(initial.view()),
                              device(starts_array.view()),
                              device(out.view(), emu::Use::output),
                              device(final.view(), emu::Use::output)};
  emu::EmulatorLauncher launcher(4, shared_per_block);
  cuda::launch_lightning_attention(args, launcher);

  Worst worst_out, worst_state;
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t n = 0; n < count; ++n) {
      Recurrence head(dk, dv);
      for (int64_t d = 0; d < dk; ++d) {
        for (int64_t c = 0; c < dv; ++c) head.state(d, c) = element(initial.view(), {n, h, d, c});
      }
      for (int64_t t = starts[static_cast<size_t>(n)]; t < starts[static_cast<size_t>(n) + 1]; ++t) {
        const std::vector<double> want = head.step(
            per_token ? element(log.view(), {0, t, h}) : element(log.view(), {h}), 0.25,
            [&](int64_t d) { return element(q.view(), {0, t, h, d}); },
            [&](int64_t d) { return element(k.view(), {0, t, h, d}); },
            [&](int64_t c) { return element(v.view(), {0, t, h, c}); });
        for (int64_t c = 0; c < dv; ++c) {
          worst_out.see(element(args.out, {0, t, h, c}), want[static_cast<size_t>(c)]);
        }
      }
      for (int64_t d = 0; d < dk; ++d) {
        for (int64_t c = 0; c < dv; ++c) worst_state.see(element(args.final_state, {n, h, d, c}), head.state(d, c));
      }
    }
    for (int64_t t = tokens - kUnowned; t < tokens; ++t) {
      for (int64_t c = 0; c < dv; ++c) worst_out.see(element(args.out, {0, t, h, c}), 0);
    }
  }
  const std::string what = "forward " + std::to_string(dk) + " x " + std::to_string(dv);
  expect_close(worst_state, 5e-6, what + ", states");
  expect_close(worst_out, dtype == DType::bf16 ? 2e-2 : 4e-3, what + ", out");
}

// Gradients of all inputs of one sequence, by the recurrence from its end.
void test_backward(int64_t dk, int64_t dv, int64_t tokens, bool per_token) {
  constexpr double kScale = 0.5;
  test::Random random(7);
  const Array q = Array::random(DType::bf16, {1, tokens, 1, dk}, random);
  const Array k = Array::random(DType::bf16, {1, tokens, 1, dk}, random);
  const Array v = Array::random(DType::bf16, {1, tokens, 1, dv}, random);
  const Array grad = Array::random(DType::bf16, {1, tokens, 1, dv}, random);
  const Array initial = Array::random(DType::f32, {1, 1, dk, dv}, random);
  const Array grad_final = Array::random(DType::f32, {1, 1, dk, dv}, random);
  Array log = per_token ? Array::random(DType::f32, {1, tokens, 1}, random) : Array::random(DType::f32, {1}, random);
  for (int64_t i = 0; i < log.view().numel(); ++i) log.set(i, -0.3f * std::fabs(log.view().ptr<const float>()[i]));
  OnDevice device;
  LightningBackwardArgs args;
  args.grad_out = device(grad.view());
  args.grad_final_state = device(grad_final.view());
  args.q = device(q.view());
  args.k = device(k.view());
  args.v = device(v.view());
  args.log_decay = device(log.view());
  args.scale = kScale;
  args.initial_state = device(initial.view());
  args.grad_q = device(q.view(), emu::Use::output);
  args.grad_k = device(k.view(), emu::Use::output);
  args.grad_v = device(v.view(), emu::Use::output);
  args.grad_log_decay = device(log.view(), emu::Use::output);
  args.grad_initial_state = device(initial.view(), emu::Use::output);
  emu::EmulatorLauncher launcher;
  emu::EmulatorWorkspace workspace;
  cuda::launch_lightning_attention_backward(args, launcher, workspace);

  const auto decay = [&](int64_t t) {
    return std::exp(per_token ? element(log.view(), {0, t, 0}) : element(log.view(), {0}));
  };
  const auto at = [](const Array& x, int64_t t, int64_t d) { return element(x.view(), {0, t, 0, d}); };
  const auto state_of = [&](const Array& x) {
    std::vector<double> s(static_cast<size_t>(dk * dv));
    for (int64_t i = 0; i < dk * dv; ++i) s[static_cast<size_t>(i)] = element(x.view(), {0, 0, i / dv, i % dv});
    return s;
  };
  Worst worst_rows, worst_state, worst_decays;
  std::vector<double> s = state_of(initial), r = state_of(grad_final);
  std::vector<std::vector<double>> before;  // S before each token
  for (int64_t t = 0; t < tokens; ++t) {
    before.push_back(s);
    for (int64_t d = 0; d < dk; ++d) {
      double sum = 0;
      for (int64_t c = 0; c < dv; ++c) {
        double& x = s[static_cast<size_t>(d * dv + c)];
        x = decay(t) * x + at(k, t, d) * at(v, t, c);
        sum += kScale * x * at(grad, t, c);
      }
      worst_rows.see(element(args.grad_q, {0, t, 0, d}), sum);
    }
  }
  double of_head = 0;
  for (int64_t t = tokens; t-- > 0;) {
    std::vector<double> of_v(static_cast<size_t>(dv));
    double of_decay = 0;
    for (int64_t d = 0; d < dk; ++d) {
      double of_k = 0;
      for (int64_t c = 0; c < dv; ++c) {
        double& x = r[static_cast<size_t>(d * dv + c)];
        x += kScale * at(q, t, d) * at(grad, t, c);
        of_k += x * at(v, t, c);
        of_v[static_cast<size_t>(c)] += x * at(k, t, d);
        x *= decay(t);
        of_decay += x * before[static_cast<size_t>(t)][static_cast<size_t>(d * dv + c)];
      }
      worst_rows.see(element(args.grad_k, {0, t, 0, d}), of_k);
    }
    for (int64_t c = 0; c < dv; ++c) worst_rows.see(element(args.grad_v, {0, t, 0, c}), of_v[static_cast<size_t>(c)]);
    if (per_token) worst_decays.see(element(*args.grad_log_decay, {0, t, 0}), of_decay);
    of_head += of_decay;
  }
  if (!per_token) worst_decays.see(element(*args.grad_log_decay, {0}), of_head);
  for (int64_t i = 0; i < dk * dv; ++i) {
    worst_state.see(element(*args.grad_initial_state, {0, 0, i / dv, i % dv}), r[static_cast<size_t>(i)]);
  }
  const std::string what = "backward " + std::to_string(dk) + " x " + std::to_string(dv);
  expect_close(worst_state, 5e-6, what + ", states");
  expect_close(worst_rows, 3e-2, what + ", rows");
  expect_close(worst_decays, per_token ? 1e-5 : 2e-5, what + ", decays");
}

}  // namespace
}  // namespace kvk

int main() {
  return kvk::emu::run_tests([] {
    kvk::test_decode(kvk::DType::bf16, 144, 72, true);
    kvk::test_decode(kvk::DType::f32, 40, 8, false);
    // Four chunks, one, none, and one of a single token.
    kvk::test_forward(kvk::DType::bf16, 24, 72, {230, 64, 0, 1}, true, 227 * 1024);
    kvk::test_forward(kvk::DType::f16, 64, 24, {140}, false, 60 * 1024);
    kvk::test_backward(24, 32, 150, true);
    kvk::test_backward(32, 24, 64, false);
  });
}
