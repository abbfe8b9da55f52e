// Where an array lies, and the stream that Python gave for this call: csrc/torch/device.cc of the array face.
#include "array/call.h"
#include "torch/adapter.h"

namespace kvk::torch_face {

Device device_of(const TorchTensor& t) {
  if (t.is_cpu()) return {DeviceType::cpu, 0};
  return {t.is_cuda() ? DeviceType::cuda : DeviceType::other, t.get_device_index()};
}

void* current_stream(const Device& device) {
  return device.type == DeviceType::cuda ? array::current_call().stream : nullptr;
}

}  // namespace kvk::torch_face
