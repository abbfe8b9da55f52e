// What launch code (csrc/cuda/<family>.cc) sees of a device: properties, and a way to run a kernel instantiation.
//
// Two implementations: the driver with kernels compiled by NVRTC (driver_launcher.h), and, in tests, the device emulator,
// so that the same launch code runs and is checked on machines without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvk::cuda {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// One instantiation of a kernel template. Every kernel takes exactly one argument, its struct of parameters.
struct Kernel {
  const char* header;  // under include/, e.g. "kvk/device/paged_decode.cuh"
  std::string
      expression;  // e.g. "kvk::device::paged_decode_kernel<kvk::device::DecodeConfig<128, 128, 4, kvk::device::bf16>>"
};

struct DeviceProperties {
  int arch = 0;  // compute capability, e.g. 90
  int num_sms = 0;
  int max_shared_per_block = 0;  // bytes, with opt-in
};

class Launcher {
 public:
  virtual ~Launcher() = default;
  virtual const DeviceProperties& properties() const = 0;
  // Queues the kernel on the launcher's stream. Throws kvk::Error naming the kernel when it cannot be compiled or started.
  virtual void launch(const Kernel& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const void* params,
                      size_t params_size) = 0;
  // Waits for all that is queued on the stream, then copies from the device. Only debugging does so.
  virtual void read(void* host, const void* device, size_t bytes) = 0;
};

}  // namespace kvk::cuda
