// Lightning linear attention: attention without softmax whose memory of the past is one matrix a head.
#pragma once

#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/types.h"

namespace kvk {

inline constexpr int64_t kMaxLightningDim = 256;  // of Dk and of Dv

// For every sequence and head, token by token:
//   S = exp(log_decay) * S + k v^T
//   out = scale * S^T q
struct LightningArgs {
  Tensor q;                         // [B, T, H, Dk], f32 | bf16 | f16, last stride 1
  Tensor k;                         // [B, T, H, Dk]
  Tensor v;                         // [B, T, H, Dv]
  std::optional<Tensor> log_decay;  // f32 [H] | [B, T, H], <= 0; none: no decay
  double scale = 1.0;
  std::optional<Tensor> initial_state;  // f32 [N, H, Dk, Dv], last stride 1; none: zeros
  std::optional<Tensor>
      cu_seqlens;      // i32 [N + 1], with B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1];
                       // none: N = B, a sequence a batch row
  Tensor out;          // [B, T, H, Dv], q's dtype, written (tokens of no sequence: 0)
  Tensor final_state;  // f32 [N, H, Dk, Dv], last stride 1, written; may be initial_state itself
};

// Gradient of lightning_attention, from its inputs and the gradients of its outputs.
struct LightningBackwardArgs {
  Tensor grad_out;                         // [B, T, H, Dv], q's dtype
  std::optional<Tensor> grad_final_state;  // f32 [N, H, Dk, Dv]; none: zeros
  Tensor q, k, v;                          // as above
  std::optional<Tensor> log_decay;
  double scale = 1.0;
  std::optional<Tensor> initial_state;
  std::optional<Tensor> cu_seqlens;
  Tensor grad_q, grad_k, grad_v;             // as q, k, v, written
  std::optional<Tensor> grad_log_decay;      // as log_decay, written; none: not wanted, which saves time and memory
  std::optional<Tensor> grad_initial_state;  // f32 [N, H, Dk, Dv], written; none: not wanted
};

// One token for each of B rows, on states that lie in a pool.
struct LightningDecodeArgs {
  Tensor q;                         // [B, H, Dk], f32 | bf16 | f16, last stride 1
  Tensor k;                         // [B, H, Dk]
  Tensor v;                         // [B, H, Dv]
  Tensor state;                     // f32 [S, H, Dk, Dv], last stride 1, updated in place
  Tensor slots;                     // i32 [B], all different: row b's state; negative: the row is skipped, its out is 0
  std::optional<Tensor> log_decay;  // f32 [H] | [B, H], <= 0; none: no decay
  double scale = 1.0;
  Tensor out;  // [B, H, Dv], q's dtype, written
};

KVK_API void lightning_attention(const LightningArgs& args, const Context& context = {});
KVK_API void lightning_attention_backward(const LightningBackwardArgs& args, const Context& context = {});
KVK_API void lightning_decode(const LightningDecodeArgs& args, const Context& context = {});

}  // namespace kvk
