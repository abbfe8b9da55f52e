// Linear attention that is normalised: softmax attention's weights replaced by products of feature maps. And one such map.
#pragma once

#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk {

inline constexpr int64_t kMaxLinearDim = 256;  // of Dk and of Dv
inline constexpr int64_t kMaxTaylorDim = 256;

// For every sequence and head, with the tokens j that token t sees, S0 the initial state and z0 the initial z:
//   num_t = scale * (S0^T q_t + sum over j of (q_t . k_j) v_j)
//   den_t = scale * (z0 . q_den_t + sum over j of q_den_t . k_den_j)
//   out_t = num_t / (den_t + eps), or num_t itself
// All j if not causal; else those up to the end of t's block of `block_size` tokens, counted from the sequence's start.
struct LinearAttentionArgs {
  Tensor q;                     // [B, T, H, Dk], f32 | bf16 | f16, last stride 1: feature maps are applied already
  Tensor k;                     // [B, T, H, Dk]
  Tensor v;                     // [B, T, H, Dv]
  std::optional<Tensor> q_den;  // [B, T, H, Dk], q's dtype; none: q
  std::optional<Tensor> k_den;  // [B, T, H, Dk], q's dtype; none: k
  std::optional<Tensor> initial_state;  // f32 [N, H, Dk, Dv], last stride 1; none: zeros
  std::optional<Tensor> initial_z;      // f32 [N, H, Dk], last stride 1; none: zeros
  std::optional<Tensor> cu_seqlens;     // i32 [N + 1], with B = 1; none: N = B, a sequence a batch row
  bool causal = true;
  int64_t block_size = 1;  // >= 1; 1 if not causal
  bool normalize = true;   // divide
  double scale = 1.0;
  double eps = 1e-6;
  Tensor out;          // [B, T, H, Dv], q's dtype, written (tokens of no sequence: 0)
  Tensor den;          // f32 [B, T, H], written, without eps (tokens of no sequence: 0)
  Tensor final_state;  // f32 [N, H, Dk, Dv], last stride 1, written: S0 + sum of k v^T; may be initial_state itself
  Tensor final_z;      // f32 [N, H, Dk], last stride 1, written: z0 + sum of k_den; may be initial_z itself
};

// Gradient of linear_attention, from its inputs and the gradients of its outputs. The outputs themselves are not read.
struct LinearAttentionBackwardArgs {
  LinearAttentionArgs forward;             // without out, den, final_state, final_z
  Tensor grad_out;                         // [B, T, H, Dv], q's dtype, last stride 1
  std::optional<Tensor> grad_den;          // f32 [B, T, H]; none: zeros
  std::optional<Tensor> grad_final_state;  // f32 [N, H, Dk, Dv], last stride 1; none: zeros
  std::optional<Tensor> grad_final_z;      // f32 [N, H, Dk], last stride 1; none: zeros
  Tensor grad_q, grad_k, grad_v;           // as q, k, v, written
  std::optional<Tensor> grad_q_den;        // as q_den, written; given where q_den is, for else grad_q holds both
  std::optional<Tensor> grad_k_den;
  std::optional<Tensor> grad_initial_state;  // f32 [N, H, Dk, Dv], written; none: not wanted
  std::optional<Tensor> grad_initial_z;      // f32 [N, H, Dk], written; none: not wanted
};

// The second-order Taylor map of Based: phi(x) . phi(y) = 1 + s + s^2 / 2 with s = x . y / sqrt(d). In that order, i <= j:
//   1, x_i / d^(1/4), x_i x_j / sqrt(d), of which the squares are divided by sqrt(2)
struct TaylorFeatureMapArgs {
  Tensor x;    // [..., d], f32 | bf16 | f16, last stride 1, d from 1 to kMaxTaylorDim
  Tensor out;  // [..., 1 + d + d (d + 1) / 2], x's dtype, last stride 1, written
};

struct TaylorFeatureMapBackwardArgs {
  Tensor grad;    // [..., 1 + d + d (d + 1) / 2], x's dtype, last stride 1
  Tensor x;       // as above
  Tensor grad_x;  // as x, written
};

constexpr int64_t taylor_features(int64_t d) { return 1 + d + d * (d + 1) / 2; }

KVK_API void linear_attention(const LinearAttentionArgs& args, const Context& context = {});
KVK_API void linear_attention_backward(const LinearAttentionBackwardArgs& args, const Context& context = {});
KVK_API void taylor_feature_map(const TaylorFeatureMapArgs& args, const Context& context = {});
KVK_API void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, const Context& context = {});

}  // namespace kvk
