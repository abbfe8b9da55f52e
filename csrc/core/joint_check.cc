#include "core/joint_check.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/quant_check.h"

namespace kvk {
namespace {

void check_is_permutation(const ArgChecker& check, const Permutation& p, int64_t rows, int64_t n) {
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(seen.begin(), seen.end(), false);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t channel = p.channel(r, i);
      if (channel < 0 || channel >= n || seen[static_cast<size_t>(channel)]) {
        fail(check.op(), "k_permutation must hold each of 0 to ", n - 1, " once in a row, got ", channel, " at entry ",
             i, " of row ", r);
      }
      seen[static_cast<size_t>(channel)] = true;
    }
  }
}

}  // namespace

void check_joint_heads(const ArgChecker& check, const QuantFormat& format, int64_t num_kv_heads) {
  for (const auto& [rotate, name] : {std::pair(format.k.rotate, "k_rotate"), std::pair(format.v.rotate, "v_rotate")}) {
    if (rotate > 1 && num_kv_heads % rotate != 0) {
      fail(check.op(), "fmt: ", name, " must divide the number of kv heads, ", num_kv_heads, ", got ", rotate);
    }
  }
}

Permutation check_permutation(const ArgChecker& check, const std::optional<Tensor>& permutation,
                              const QuantFormat& format, int64_t num_kv_heads) {
  if (!permutation) return {};
  const int64_t joint = format.k.joint_heads(), n = joint * format.head_dim;
  check.tensor(*permutation, "k_permutation", DType::i32, {{"Hkv / m", num_kv_heads / joint}, {"m * D", n}});
  const Permutation view = {permutation->ptr<const int32_t>(), permutation->stride[0], permutation->stride[1]};
  if (check.device().type == DeviceType::cpu) check_is_permutation(check, view, num_kv_heads / joint, n);
  return view;
}

void check_restored(const ArgChecker& check, const std::optional<Tensor>& permutation,
                    const std::optional<Tensor>& rope, const QuantFormat& format, PagedProblem& problem,
                    QuantPools& pools) {
  check_joint_heads(check, format, problem.num_kv_heads);
  pools.permutation = check_permutation(check, permutation, format, problem.num_kv_heads);
  problem.joint_heads = std::lcm(format.k.joint_heads(), format.v.joint_heads());
  if (problem.joint_heads > 1 && problem.list.per_head()) {
    fail(check.op(),
         "page_indices and kv_lens must be the same for all kv heads where the format rotates several of "
         "them together");
  }
  if (!rope) return;
  check.tensor(*rope, "k_rope", DType::f32, {{"max_len"}, {"rotary_dim"}});
  check.last_stride_one(*rope, "k_rope");
  const int64_t dim = rope->shape[1];
  if (dim < 2 || dim % 2 != 0 || dim > format.head_dim) {
    fail(check.op(), "k_rope must have an even rotary_dim of 2 to ", format.head_dim, ", got ", dim);
  }
  pools.rope = {rope->ptr<const float>(), rope->stride[0], static_cast<int32_t>(dim)};
  if (check.device().type != DeviceType::cpu) return;
  for (int64_t b = 0; b < problem.num_requests; ++b) {
    for (int32_t h = 0; h < (problem.list.per_head() ? problem.num_kv_heads : 1); ++h) {
      if (problem.list.len(b, h) > rope->shape[0]) {
        fail(check.op(), "k_rope has ", rope->shape[0], " positions, request ", b, " has ", problem.list.len(b, h),
             " keys");
      }
    }
  }
}

void refuse_joint_on_a_card(const ArgChecker& check, const QuantFormat& format, bool permutation, bool rope) {
  if (check.device().type == DeviceType::cpu) return;
  const auto refuse = [&](const char* what) {
    fail(check.op(), what, " is for tensors on cpu, got ", device_name(check.device()));
  };
  if (format.k.rotate > 1) refuse("fmt: k_rotate over several heads");
  if (format.v.rotate > 1) refuse("fmt: v_rotate over several heads");
  if (permutation) refuse("k_permutation");
  if (rope) refuse("k_rope");
}

}  // namespace kvk
