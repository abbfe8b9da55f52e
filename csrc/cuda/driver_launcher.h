// The Launcher of real cards: kernels compiled by NVRTC, run through the driver.
#pragma once

#include <string>
#include <vector>

#include "cuda/driver.h"
#include "cuda/launcher.h"

namespace kvk::cuda {

struct DeviceState;

// Cheap to make: what is known of a card (context, loaded kernels) is kept once per process. The caller's current CUDA
// context is left as it was. Several threads may launch at once, each with a launcher of its own.
class DriverLauncher final : public Launcher {
 public:
  // `device` as torch counts (CUDA_VISIBLE_DEVICES applied). Throws kvk::Error: no driver, no such card, one too old.
  DriverLauncher(int device, void* stream);

  const DeviceProperties& properties() const override;

  // Compiles and loads the kernel at its first launch. While the stream is being captured into a CUDA graph nothing is
  // compiled: the kernel must have run before, or be in the cache (kvk.precompile). A grid of no blocks does nothing.
  // KVK_CHECK=1: waits for the kernel, so that its error is reported here.
  void launch(const Kernel& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const void* params,
              size_t params_size) override;

  // Refused while the stream is being captured into a CUDA graph.
  void read(void* host, const void* device, size_t bytes) override;

  // Whether the stream is being captured into a CUDA graph.
  bool capturing() const;

  // What the first launch does, without launching.
  void load(const Kernel& kernel);

 private:
  DeviceState& device_;
  CUstream stream_;
};

struct DeviceDescription {
  std::string name;
  DeviceProperties properties;
};

// The cards that the driver sees; makes no context. Throws kvk::Error without a driver; none is an empty list.
std::vector<DeviceDescription> list_devices();

}  // namespace kvk::cuda
