// What tests of whole ops need beside the launcher: workspaces in device memory.
#pragma once

#include <list>

#include "cuda/launch.h"
#include "emulator/harness.h"
#include "emulator/launcher.h"

namespace kvk::emu {

// Allocations live as long as this.
class EmulatorWorkspace final : public cuda::Workspace {
 public:
  void* allocate(int64_t bytes) override {
    buffers_.emplace_back(static_cast<size_t>(bytes), "workspace");
    return buffers_.back().data();
  }

 private:
  std::list<DeviceArray<char>> buffers_;
};

}  // namespace kvk::emu
