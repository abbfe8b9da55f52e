// Cases of block-sparse and neighborhood attention on CUDA: libkvk's launch code over the emulator, the forward pass or the
// gradient, against loops over all pairs in double.
#pragma once

#include <functional>

#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"

namespace kvk {

using test::Array;
using test::element;

// What is added to the score of query token i, head h and key token j; -inf: it is not seen.
using Bias = std::function<double(int64_t i, int64_t h, int64_t j)>;

// Tensors [tokens, heads, dim] of one call and its gradient, and what is wanted of both.
struct Case {
  Array q, k, v, grad_out, grad_lse, out, lse, dq, dk, dv;
  int64_t group;
  double scale = 0.2;
  std::vector<double> want_out, want_lse, want_dq, want_dk, want_dv;

  Case(DType dtype, int64_t tokens, int64_t keys, int64_t kv_heads, int64_t heads, int64_t dim, int64_t dim_v,
       test::Random random, bool gradient, const Bias& bias)
      : q(Array::random(dtype, {tokens, heads, dim}, random)), k(Array::random(dtype, {keys, kv_heads, dim}, random)),
        v(Array::random(dtype, {keys, kv_heads, dim_v}, random)),
        grad_out(Array::random(dtype, {tokens, heads, dim_v}, random)),
        grad_lse(Array::random(DType::f32, {tokens, heads}, random)), out(dtype, {tokens, heads, dim_v}),
        lse(DType::f32, {tokens, heads}), dq(dtype, {tokens, heads, dim}), dk(dtype, {keys, kv_heads, dim}),
        dv(dtype, {keys, kv_heads, dim_v}), group(heads / kv_heads) {
    solve(bias, gradient);
    // The gradient takes them; the forward pass writes its own.
    for (size_t i = 0; i < want_out.size(); ++i) out.set(static_cast<int64_t>(i), static_cast<float>(want_out[i]));
    for (size_t i = 0; i < want_lse.size(); ++i) lse.set(static_cast<int64_t>(i), static_cast<float>(want_lse[i]));
  }

  // The problem on the device; view(t): of the grid's tokens.
  template <class View>
  void fill(GridProblem& p, OnDevice& device, bool gradient, View&& view) const {
    p.dtype = q.view().dtype;
    p.num_kv_heads = static_cast<int32_t>(k.view().shape[1]);
    p.group = static_cast<int32_t>(group);
    p.head_dim = static_cast<int32_t>(q.view().shape[2]);
    p.head_dim_v = static_cast<int32_t>(v.view().shape[2]);
    p.softmax_scale = static_cast<float>(scale);
    const emu::Use results = gradient ? emu::Use::input : emu::Use::output;
    const auto put = [&](GridView& to, const Array& from, emu::Use use) { to = view(device(from.view(), use)); };
    put(p.q, q, emu::Use::input);
    put(p.k, k, emu::Use::input);
    put(p.v, v, emu::Use::input);
    put(p.out, out, results);
    put(p.lse, lse, results);
    if (!gradient) return;
    put(p.grad_out, grad_out, emu::Use::input);
    put(p.grad_lse, grad_lse, emu::Use::input);
    put(p.dq, dq, emu::Use::output);
    put(p.dk, dk, emu::Use::output);
    put(p.dv, dv, emu::Use::output);
  }

  void compare(const GridProblem& p, bool gradient, const std::string& what) {
    if (gradient) {
      compare(dq, p.dq, want_dq, what + ", dq");
      compare(dk, p.dk, want_dk, what + ", dk");
      compare(dv, p.dv, want_dv, what + ", dv");
    } else {
      compare(out, p.out, want_out, what + ", out");
      compare(lse, p.lse, want_lse, what + ", lse");
    }
  }

 private:
  static double& at(std::vector<double>& x, int64_t i) { return x[static_cast<size_t>(i)]; }

  void solve(const Bias& bias, bool gradient) {
    const Tensor &tq = q.view(), &tk = k.view(), &tv = v.view(), &grad = grad_out.view();
    const int64_t keys = tk.shape[0], kv_heads = tk.shape[1], dim = tq.shape[2], dim_v = tv.shape[2];
    const std::pair<std::vector<double>*, const Array*> wanted[] = {
        {&want_out, &out}, {&want_lse, &lse}, {&want_dq, &dq}, {&want_dk, &dk}, {&want_dv, &dv}};
    for (const auto& [x, as] : wanted) x->resize(static_cast<size_t>(as->view().numel()));
    std::vector<double> weights(static_cast<size_t>(keys));
    for (int64_t i = 0; i < tq.shape[0]; ++i) {
      for (int64_t h = 0; h < tq.shape[1]; ++h) {
        const int64_t row = i * tq.shape[1] + h;
        double sum = 0, delta = -element(grad_lse.view(), {i, h});
        for (int64_t j = 0; j < keys; ++j) {
          double s = 0;
          for (int64_t d = 0; d < dim; ++d) s += element(tq, {i, h, d}) * element(tk, {j, h / group, d});
          sum += at(weights, j) = std::exp(s * scale + bias(i, h, j));
        }
        at(want_lse, row) = std::log(sum);
        for (int64_t c = 0; c < dim_v; ++c) {
          double& x = at(want_out, row * dim_v + c);
          for (int64_t j = 0; j < keys; ++j) {
            if (at(weights, j) > 0) x += at(weights, j) / sum * element(tv, {j, h / group, c});
          }
          delta += x * element(grad, {i, h, c});
        }
        for (int64_t j = 0; gradient && j < keys; ++j) {
          if (at(weights, j) == 0) continue;
          const double weight = at(weights, j) / sum;
          const int64_t key = j * kv_heads + h / group;
          double ds = -delta;
          for (int64_t c = 0; c < dim_v; ++c) {
            ds += element(grad, {i, h, c}) * element(tv, {j, h / group, c});
            at(want_dv, key * dim_v + c) += weight * element(grad, {i, h, c});
          }
          ds *= weight * scale;
          for (int64_t d = 0; d < dim; ++d) {
            at(want_dq, row * dim + d) += ds * element(tk, {j, h / group, d});
            at(want_dk, key * dim + d) += ds * element(tq, {i, h, d});
          }
        }
      }
    }
  }

  // The worst error beside the largest number.
  static void compare(Array& array, const GridView& got, std::vector<double>& want, const std::string& what) {
    Tensor flat = array.view();
    std::memcpy(flat.data, got.data, array.bytes());
    const int64_t count = flat.numel();
    flat.ndim = 1;
    flat.stride[0] = 1;
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = element(flat, {i}), right = at(want, i);
      worst = std::max(worst, x == right ? 0 : std::isnan(x - right) ? INFINITY : std::fabs(x - right));
      if (std::isfinite(right)) largest = std::max(largest, std::fabs(right));
    }
    // lse is as exact as fp32, but for the products' rounding.
    const double limit = flat.dtype == DType::f32 ? 1e-3 : tolerance(flat.dtype) * largest;
    emu::expect(worst <= limit, what + " up to " + std::to_string(largest) + ": worst error " + std::to_string(worst));
  }
};

inline Tensor lists(const std::vector<int32_t>& values, OnDevice& device, std::list<Array>& kept) {
  kept.push_back(Array::of(values));
  Tensor t = device(kept.back().view());
  t.ndim = 3;
  t.shape[2] = t.shape[0];
  t.stride[2] = t.stride[0];
  t.shape[0] = t.shape[1] = 1;
  return t;
}

// Two sequences and tokens of none under one causal pattern with a bias a block.
inline void test_blocks(bool gradient, int64_t block_q, int64_t block_k, int64_t group) {
  const std::vector<int32_t> q_starts = {0, 70, 130}, k_starts = {0, 100, 230};
  constexpr int64_t kUnowned = 2;
  const int64_t rows = (70 + block_q - 1) / block_q, columns = (130 + block_k - 1) / block_k;
  std::vector<int32_t> row_ptr = {0}, col_idx;
  std::vector<float> biases;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = columns - 1; n >= 0; --n) {  // not in order
      if ((m * 5 + n * 3) % 4 == 0 || m == 1) continue;
      col_idx.push_back(static_cast<int32_t>(n));
      biases.push_back((m + n) % 7 == 6 ? -INFINITY : static_cast<float>(m - n) * 0.25f);
    }
    row_ptr.push_back(static_cast<int32_t>(col_idx.size()));
  }
  Case c(DType::bf16, 130 + kUnowned, 230, 2, 2 * group, 32, 40, test::Random(4), gradient,
         [&](int64_t i, int64_t, int64_t j) {
           const size_t b = i < 70 ? 0 : 1;
           const int64_t len = q_starts[b + 1] - q_starts[b], keys = k_starts[b + 1] - k_starts[b];
           i -= q_starts[b];
           j -= k_starts[b];
           if (i >= len || j < 0 || j >= keys || j > i + keys - len) return -INFINITY;
           for (int32_t e = row_ptr[static_cast<size_t>(i / block_q)];
                e < row_ptr[static_cast<size_t>(i / block_q) + 1]; ++e) {
             if (col_idx[static_cast<size_t>(e)] == j / block_k) return biases[static_cast<size_t>(e)];
           }
           return -INFINITY;
         });
  OnDevice device;
  std::list<Array> kept;
  BlockSparseProblem p;
  c.fill(p, device, gradient, [](const Tensor& t) { return packed_view(t); });
  const Array starts[2] = {Array::of(q_starts), Array::of(k_starts)};
  p.queries = {device(starts[0].view()).ptr<const int32_t>(), 1, 2, 130 + kUnowned};
  p.keys = {device(starts[1].view()).ptr<const int32_t>(), 1, 2, 230};
  p.pattern.row_ptr = lists(row_ptr, device, kept);
  p.pattern.col_idx = lists(col_idx, device, kept);
  const emu::DeviceArray<float> entry_bias(biases);
  p.pattern.entry_bias = p.pattern.col_idx;
  p.pattern.entry_bias->data = entry_bias.data();
  p.pattern.block_q = block_q;
  p.pattern.block_k = block_k;
  p.causal = true;
  emu::EmulatorLauncher launcher;
  emu::EmulatorWorkspace workspace;
  if (gradient) {
    cuda::launch_block_sparse_attention_backward(p, launcher, workspace);
  } else {
    cuda::launch_block_sparse_attention(p, launcher);
  }
  c.compare(p, gradient, "blocks of " + std::to_string(block_q) + " x " + std::to_string(block_k));
}

// 2-D, dimension 0 causal.
inline void test_neighborhood(bool gradient, int64_t X, int64_t Y, NeighborhoodAxis x, NeighborhoodAxis y,
                              int64_t group, int64_t dim, int shared_per_block) {
  const auto sees = [](const NeighborhoodAxis& axis, int64_t extent, int64_t i, int64_t j) {
    const int64_t d = axis.dilation, w = axis.kernel_size, group_of = i % d;
    if (j % d != group_of) return false;
    const int64_t n = extent / d + (group_of < extent % d ? 1 : 0), at = i / d, key = j / d;
    if (axis.is_causal) {
      const int64_t leader = std::min(at / axis.stride * axis.stride + axis.stride - 1, n - 1);
      return key > leader - w && key <= at;
    }
    const int64_t leader = std::min(at / axis.stride * axis.stride + axis.stride / 2, n - 1);
    const int64_t begin = std::clamp<int64_t>(leader - w / 2, 0, n - w);
    return begin <= key && key < begin + w;
  };
  Case c(DType::f16, X * Y, X * Y, 1, group, dim, dim, test::Random(9), gradient, [&](int64_t i, int64_t, int64_t j) {
    return sees(x, X, i / Y, j / Y) && sees(y, Y, i % Y, j % Y) ? 0.0 : -INFINITY;
  });
  OnDevice device;
  NeighborhoodProblem p;
  c.fill(p, device, gradient,
         [&](const Tensor& t) { return GridView{t.data, {0, 0, t.stride[0] * Y, t.stride[0]}, t.stride[1]}; });
  p.batch = 1;
  p.extent[1] = X;
  p.extent[2] = Y;
  p.axes[1] = x;
  p.axes[2] = y;
  emu::EmulatorLauncher launcher(4, shared_per_block);
  emu::EmulatorWorkspace workspace;
  if (gradient) {
    cuda::launch_neighborhood_attention_backward(p, launcher, workspace);
  } else {
    cuda::launch_neighborhood_attention(p, launcher);
  }
  c.compare(p, gradient, "neighborhood of " + std::to_string(X) + " x " + std::to_string(Y));
}

}  // namespace kvk
