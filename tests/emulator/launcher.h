// The launch code of csrc/cuda over the emulator: kernels by name, in the order of the calls.
#pragma once

#include <cstring>

#include "cuda/launcher.h"
#include "emulator/emulator.h"

namespace kvk::emu {

class EmulatorLauncher final : public cuda::Launcher {
 public:
  // num_sms only sets how many blocks the launch code asks for; shared_per_block what a block may have.
  explicit EmulatorLauncher(int num_sms = 4, int shared_per_block = int(max_smem_bytes()))
      : properties_{options().arch / 10, num_sms, shared_per_block} {}

  const cuda::DeviceProperties& properties() const override { return properties_; }

  void launch(const cuda::Kernel& kernel, cuda::Dim3 grid, cuda::Dim3 block, size_t shared_bytes, const void* params,
              size_t params_size) override {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // like DriverLauncher
    const LaunchConfig config = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes};
    launch_by_name(kernel.expression, config, params, params_size);
  }

  void read(void* host, const void* device, size_t bytes) override { std::memcpy(host, device, bytes); }

 private:
  cuda::DeviceProperties properties_;
};

}  // namespace kvk::emu
