// The Hadamard transform, which spreads outliers of keys and values over all channels before they are quantized.
#pragma once

#include <cstdint>
#include <optional>

#include "kvk/api.h"
#include "kvk/context.h"
#include "kvk/device/hadamard_params.h"
#include "kvk/types.h"

namespace kvk {

using device::hadamard_order;  // the m of n = m * 2**k; 0 where there is none
using device::kMaxHadamard;

// out = scale * H x along the last dimension, with H = H_m (x) H_{2**k}: the index of the m chunks of 2**k elements is the
// slow one. H_{2**k} is Sylvester's, H_m that of fast-hadamard-transform (docs/hadamard.md).
struct HadamardArgs {
  Tensor x;                     // [..., n], f32 | bf16 | f16, any leading strides, last stride 1
  std::optional<double> scale;  // default n**-0.5: orthonormal
  bool transpose = false;       // H^T in place of H; they differ for m in {20, 28, 40}
  Tensor out;                   // as x, written; x itself, or memory that does not overlap it
};

KVK_API void hadamard(const HadamardArgs& args, const Context& context = {});

}  // namespace kvk
