// Block-sparse and neighborhood attention on CUDA: libkvk's launch code over the emulator, against loops over all pairs in
// double.
#include <functional>

#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"
#include "kvk/device/grid.cuh"
#include "kvk/device/paged_prefill.cuh"

#define KVK_GRID(T, D, DV, SCHEDULE, ...)                 \
  KVK_EMULATED_KERNEL(kvk::device::grid_attention_kernel< \
                      kvk::device::GridConfig<kvk::device::T, D, DV, kvk::device::SCHEDULE, __VA_ARGS__>>)

KVK_GRID(bf16, 32, 40, BlockSparse, 4);
KVK_GRID(bf16, 32, 40, BlockSparse, 4, true);
KVK_GRID(f16, 32, 32, Neighborhood, 0);
KVK_GRID(f16, 256, 256, Neighborhood, 0, true);
KVK_EMULATED_KERNEL(kvk::device::clear_unowned_kernel<kvk::device::bf16, 40>);

namespace kvk {
namespace {

using test::Array;
using test::element;

// What is added to the score of query token i, head h and key token j; -inf: it is not seen.
using Bias = std::function<double(int64_t i, int64_t h, int64_t j)>;

// Tensors [tokens, heads, dim] of one call.
struct Case {
  Array q, k, v, out, lse;
  int64_t group;
  double scale = 0.2;
  Bias bias;

  Case(DType dtype, int64_t tokens, int64_t keys, int64_t kv_heads, int64_t heads, int64_t dim, int64_t dim_v,
       test::Random random, Bias pattern)
      : q(Array::random(dtype, {tokens, heads, dim}, random)), k(Array::random(dtype, {keys, kv_heads, dim}, random)),
        v(Array::random(dtype, {keys, kv_heads, dim_v}, random)), out(dtype, {tokens, heads, dim_v}),
        lse(DType::f32, {tokens, heads}), group(heads / kv_heads), bias(std::move(pattern)) {}

  // The problem on the device; views(t): of the grid's tokens.
  template <class View>
  void fill(GridProblem& p, OnDevice& device, View&& view) const {
    p.dtype = q.view().dtype;
    p.num_kv_heads = static_cast<int32_t>(k.view().shape[1]);
    p.group = static_cast<int32_t>(group);
    p.head_dim = static_cast<int32_t>(q.view().shape[2]);
    p.head_dim_v = static_cast<int32_t>(v.view().shape[2]);
    p.softmax_scale = static_cast<float>(scale);
    p.q = view(device(q.view()));
    p.k = view(device(k.view()));
    p.v = view(device(v.view()));
    p.out = view(device(out.view(), emu::Use::output));
    p.lse = view(device(lse.view(), emu::Use::output));
  }

  void compare(const GridProblem& p, const std::string& what) {
    std::memcpy(out.view().data, p.out.data, static_cast<size_t>(out.view().numel()) * 2);
    std::memcpy(lse.view().data, p.lse.data, static_cast<size_t>(lse.view().numel()) * 4);
    double worst = 0;
    const auto see = [&](double got, double want) {
      worst = std::max(worst, got == want ? 0 : std::isnan(got - want) ? INFINITY : std::fabs(got - want));
    };
    const Tensor &tq = q.view(), &tk = k.view(), &tv = v.view();
    std::vector<double> weights(static_cast<size_t>(tk.shape[0]));
    for (int64_t i = 0; i < tq.shape[0]; ++i) {
      for (int64_t h = 0; h < tq.shape[1]; ++h) {
        double sum = 0;
        for (int64_t j = 0; j < tk.shape[0]; ++j) {
          double s = 0;
          for (int64_t d = 0; d < tq.shape[2]; ++d) s += element(tq, {i, h, d}) * element(tk, {j, h / group, d});
          sum += weights[static_cast<size_t>(j)] = std::exp(s * scale + bias(i, h, j));
        }
        see(element(lse.view(), {i, h}) / 10, std::log(sum) / 10);
        for (int64_t c = 0; c < tv.shape[2]; ++c) {
          double want = 0;
          for (int64_t j = 0; j < tk.shape[0]; ++j) {
            if (weights[static_cast<size_t>(j)] == 0) continue;
            want += weights[static_cast<size_t>(j)] / sum * element(tv, {j, h / group, c});
          }
          see(element(out.view(), {i, h, c}), want);
        }
      }
    }
    emu::expect(worst <= tolerance(tq.dtype), what + ": worst error " + std::to_string(worst));
  }
};

Tensor lists(const std::vector<int32_t>& values, OnDevice& device, std::list<Array>& kept) {
  kept.push_back(Array::of(values));
  Tensor t = device(kept.back().view());
  t.ndim = 3;
  t.shape[2] = t.shape[0];
  t.stride[2] = t.stride[0];
  t.shape[0] = t.shape[1] = 1;
  return t;
}

// Two sequences and tokens of none under one causal pattern with a bias a block.
void test_blocks(int64_t block_q, int64_t block_k, int64_t group) {
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
  Case c(DType::bf16, 130 + kUnowned, 230, 2, 2 * group, 32, 40, test::Random(4), [&](int64_t i, int64_t, int64_t j) {
    const size_t b = i < 70 ? 0 : 1;
    const int64_t len = q_starts[b + 1] - q_starts[b], keys = k_starts[b + 1] - k_starts[b];
    i -= q_starts[b];
    j -= k_starts[b];
    if (i >= len || j < 0 || j >= keys || j > i + keys - len) return -INFINITY;
    for (int32_t e = row_ptr[static_cast<size_t>(i / block_q)]; e < row_ptr[static_cast<size_t>(i / block_q) + 1];
         ++e) {
      if (col_idx[static_cast<size_t>(e)] == j / block_k) return biases[static_cast<size_t>(e)];
    }
    return -INFINITY;
  });
  OnDevice device;
  std::list<Array> kept;
  BlockSparseProblem p;
  c.fill(p, device, [](const Tensor& t) { return packed_view(t); });
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
  cuda::launch_block_sparse_attention(p, launcher);
  c.compare(p, "blocks of " + std::to_string(block_q) + " x " + std::to_string(block_k));
}

// 2-D, dimension 0 causal.
void test_neighborhood(int64_t X, int64_t Y, NeighborhoodAxis x, NeighborhoodAxis y, int64_t group, int64_t dim,
                       int shared_per_block) {
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
  Case c(DType::f16, X * Y, X * Y, 1, group, dim, dim, test::Random(9), [&](int64_t i, int64_t, int64_t j) {
    return sees(x, X, i / Y, j / Y) && sees(y, Y, i % Y, j % Y) ? 0.0 : -INFINITY;
  });
  OnDevice device;
  NeighborhoodProblem p;
  c.fill(p, device,
         [&](const Tensor& t) { return GridView{t.data, {0, 0, t.stride[0] * Y, t.stride[0]}, t.stride[1]}; });
  p.batch = 1;
  p.extent[1] = X;
  p.extent[2] = Y;
  p.axes[1] = x;
  p.axes[2] = y;
  emu::EmulatorLauncher launcher(4, shared_per_block);
  cuda::launch_neighborhood_attention(p, launcher);
  c.compare(p, "neighborhood of " + std::to_string(X) + " x " + std::to_string(Y));
}

}  // namespace
}  // namespace kvk

int main() {
  using namespace kvk;
  return emu::run_tests([] {
    const int most = int(emu::max_smem_bytes());
    test_blocks(16, 48, 3);  // 64 rows a tile, of which 48 are there
    test_blocks(48, 16, 3);  // 128 and 16 of them; 64 keys are 4 blocks
    test_neighborhood(9, 33, {5, 2, 1, true}, {9, 3, 2, false}, 3, 32, most);          // several tiles of columns
    test_neighborhood(3, 30, {3, 1, 1, false}, {30, 1, 1, false}, 1, 256, 99 * 1024);  // 16 columns a tile
  });
}
