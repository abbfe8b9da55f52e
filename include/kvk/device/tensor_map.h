// The 128-byte descriptor of a tensor in global memory that the bulk tensor copies (TMA) take. The driver's
// cuTensorMapEncodeTiled fills it; under the emulator kvk::emu::encode_tensor_map does.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

}  // namespace kvk::device
