// The options that every op over a page table takes, as torch sees them.
#pragma once

#include "kvk/paged.h"
#include "torch/adapter.h"

#define KVK_SCORE_SCHEMA                                                                                  \
  "float? softmax_scale=None, int window_left=-1, float logits_soft_cap=0.0, Tensor? alibi_slopes=None, " \
  "Tensor? sinks=None, Tensor? key_bias=None"
#define KVK_OUT_SCHEMA ", Tensor(a!) out, Tensor(b!) lse) -> ()"

namespace kvk::torch_face {

using MaybeTensor = std::optional<TorchTensor>;

void require_rank(const char* op, const TorchTensor& t, const char* name, int64_t rank, const char* shape);

ScoreOptions score_options(std::optional<double> softmax_scale, int64_t window_left, double logits_soft_cap,
                           const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& key_bias);

}  // namespace kvk::torch_face
