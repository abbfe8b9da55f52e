// libkvk's launch code on the emulator: launches by name, workspaces in device memory.
#pragma once

#include <list>

#include "cuda/launch.h"
#include "emulator/harness.h"

namespace kvk::emu {

class EmulatedLauncher final : public cuda::Launcher, public cuda::Workspace {
 public:
  EmulatedLauncher() {
    properties_.arch = 90;
    properties_.num_sms = 4;  // few, so that blocks share the splits of a request
    properties_.max_shared_per_block = 227 * 1024;
  }
  const cuda::DeviceProperties& properties() const override { return properties_; }
  void launch(const cuda::Kernel& kernel, cuda::Dim3 grid, cuda::Dim3 block, size_t shared_bytes, const void* params,
              size_t params_size) override {
    launch_by_name(kernel.expression, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes}, params,
                   params_size);
  }
  void* allocate(int64_t bytes) override {
    buffers_.emplace_back(static_cast<size_t>(bytes), "workspace");
    return buffers_.back().data();
  }

 private:
  cuda::DeviceProperties properties_;
  std::list<DeviceArray<char>> buffers_;
};

}  // namespace kvk::emu
