// Tensors of sequences and their states as the kernels of linear attentions see them.
#pragma once

#include <algorithm>
#include <optional>

#include "kvk/device/lightning_params.h"
#include "kvk/types.h"

namespace kvk::cuda {

// f32 [N, H, Dk, Dv].
inline device::StateView state_view(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {t->ptr<float>(), t->stride[0], t->stride[1], t->stride[2], 1};
}
inline device::StateView transposed(const device::StateView& view) {
  return {view.data, view.slot_stride, view.head_stride, view.column_stride, view.row_stride};
}

// [B, T, H, ..].
inline device::SequenceView sequence_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

// Token 0 becomes the last of num_tokens.
inline device::SequenceView reversed_view(const device::SequenceView& view, int64_t num_tokens, size_t element) {
  char* data = static_cast<char*>(view.data);
  if (data != nullptr) {
    data += std::max<int64_t>(num_tokens - 1, 0) * view.token_stride * static_cast<int64_t>(element);
  }
  return {data, view.batch_stride, -view.token_stride, view.head_stride};
}

inline device::SequenceStarts sequence_starts(const Tensor& q, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return {nullptr, 0, q.shape[0], q.shape[1], false};
  return {cu_seqlens->ptr<const int32_t>(), cu_seqlens->stride[0], cu_seqlens->shape[0] - 1, q.shape[1], false};
}

}  // namespace kvk::cuda
