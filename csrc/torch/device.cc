// Where torch's tensors lie. Apart from the adapter, so that a test build can put tensors of its own elsewhere: over the
// device emulator the CPU's tensors are on a card (tests/emulator/torch_backend.cc).
#include "torch/adapter.h"
#include "torch/cuda_stream.h"

namespace kvk::torch_face {

Device device_of(const TorchTensor& t) {
  if (t.is_cpu()) return {DeviceType::cpu, 0};
  return {t.is_cuda() ? DeviceType::cuda : DeviceType::other, static_cast<int32_t>(t.get_device_index())};
}

void* current_stream(const Device& device) {
  return device.type == DeviceType::cuda ? current_cuda_stream(device.index) : nullptr;
}

}  // namespace kvk::torch_face
