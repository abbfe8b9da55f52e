// Rotation of several kv heads together, channels in another order, and keys stored before their rotary embedding.
#pragma once

#include "core/check.h"
#include "core/paged_problem.h"

namespace kvk {

// Throws where num_kv_heads is no multiple of the heads that the format rotates together.
void check_joint_heads(const ArgChecker& check, const QuantFormat& format, int64_t num_kv_heads);

// int32 [Hkv / m, m * D], m the heads that K is rotated over (1 without); a permutation in each row, which is seen to on the
// CPU. Nothing given: an empty one.
Permutation check_permutation(const ArgChecker& check, const std::optional<Tensor>& permutation,
                              const QuantFormat& format, int64_t num_kv_heads);

// The rest of the problem's pools from the options of quant_decode and quant_prefill.
void check_restored(const ArgChecker& check, const std::optional<Tensor>& permutation,
                    const std::optional<Tensor>& rope, const QuantFormat& format, PagedProblem& problem,
                    QuantPools& pools);

// Names what the kernels for cards do not have.
void refuse_joint_on_a_card(const ArgChecker& check, const QuantFormat& format, bool permutation, bool rope);

}  // namespace kvk
