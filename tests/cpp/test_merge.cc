// merge_states and its gradient against the definition in double precision, with parts that see nothing.
#include "testing.h"

namespace {

using namespace test;
using kvk::DType;

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Merged {
  std::vector<double> weight;  // of each part
  double lse;
};

// w_i = exp(lse_i - lse), lse = log sum exp(lse_i); all -inf: no weight.
Merged merged_weights(const kvk::Tensor& lse, int64_t t, int64_t h) {
  double max = -kInf, sum = 0;
  for (int64_t i = 0; i < lse.shape[0]; ++i) max = std::max(max, element(lse, {i, t, h}));
  Merged m{std::vector<double>(static_cast<size_t>(lse.shape[0]), 0.0), max};
  if (max == -kInf) return m;
  for (int64_t i = 0; i < lse.shape[0]; ++i) sum += std::exp(element(lse, {i, t, h}) - max);
  m.lse = max + std::log(sum);
  for (int64_t i = 0; i < lse.shape[0]; ++i)
    m.weight[static_cast<size_t>(i)] = std::exp(element(lse, {i, t, h}) - m.lse);
  return m;
}

void merge(DType dtype, int64_t n, int64_t T, int64_t H, int64_t D) {
  Random random(static_cast<uint64_t>(n * 1000 + D));
  Array parts = Array::random(dtype, {n, T, H, D}, random), lse = Array::random(DType::f32, {n, T, H}, random, 5.0f);
  // Some parts saw no key: their rows are NaN, which must not be read. Row 0 of all parts saw none.
  for (int64_t row = 0; row < n * T * H; ++row) {
    if (row % 5 != 3 && row % (T * H) != 0) continue;
    lse.set(row, kNone);
    for (int64_t d = 0; d < D; ++d) parts.set(row * D + d, std::nanf(""));
  }
  Array out(dtype, {T, H, D}), out_lse(DType::f32, {T, H});
  out.poison();
  out_lse.poison();
  kvk::merge_states({parts.view(), lse.view(), out.view(), out_lse.view()});

  const Array grad_out = Array::random(dtype, {T, H, D}, random), grad_lse = Array::random(DType::f32, {T, H}, random);
  Array grad_parts(dtype, {n, T, H, D}), grad_parts_lse(DType::f32, {n, T, H});
  grad_parts.poison();
  grad_parts_lse.poison();
  kvk::merge_states_backward(
      {grad_out.view(), grad_lse.view(), parts.view(), lse.view(), grad_parts.view(), grad_parts_lse.view()});

  const double eps = 1.01 * rounding(dtype);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      const Merged m = merged_weights(lse.view(), t, h);
      const std::string what = std::string("merge ") + name(dtype) + " D " + std::to_string(D);
      check_near(element(out_lse.view(), {t, h}), m.lse, 1e-5, what + " lse");
      std::vector<double> want(static_cast<size_t>(D), 0.0);
      for (int64_t i = 0; i < n; ++i) {
        const double w = m.weight[static_cast<size_t>(i)];
        for (int64_t d = 0; d < D && w > 0; ++d)
          want[static_cast<size_t>(d)] += w * element(parts.view(), {i, t, h, d});
      }
      for (int64_t d = 0; d < D; ++d) {
        const double x = want[static_cast<size_t>(d)];
        check_near(element(out.view(), {t, h, d}), x, 1e-5 + eps * std::abs(x), what + " out");
      }
      // d out / d part_i = w_i;  d L / d lse_i = w_i (g . (part_i - out) + g_lse)
      for (int64_t i = 0; i < n; ++i) {
        const double w = m.weight[static_cast<size_t>(i)];
        double of_lse = w > 0 ? element(grad_lse.view(), {t, h}) : 0.0;
        for (int64_t d = 0; d < D; ++d) {
          const double g = element(grad_out.view(), {t, h, d});
          check_near(element(grad_parts.view(), {i, t, h, d}), w * g, 1e-5 + eps * std::abs(w * g), what + " grad");
          if (w > 0) of_lse += g * (element(parts.view(), {i, t, h, d}) - want[static_cast<size_t>(d)]);
        }
        const double tolerance = 1e-5 * (1 + static_cast<double>(D));
        check_near(element(grad_parts_lse.view(), {i, t, h}), w * of_lse, tolerance, what + " grad of lse");
      }
    }
  }
}

}  // namespace

int main() {
  return run([] {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const int64_t D : {1, 3, 8, 15, 16, 17, 33, 64, 128, 257}) {
        merge(dtype, 3, 4, 3, D);
        merge(dtype, 1, 1, 2, D);
      }
      merge(dtype, 9, 5, 2, 64);
    }
  });
}
