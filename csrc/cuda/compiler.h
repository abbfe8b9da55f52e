// From a kernel instantiation to a cubin: the memory of this process, the cubins shipped with kvk, the cache on disk, and
// last NVRTC.
#pragma once

#include <memory>
#include <string>

#include "cuda/cubin_cache.h"
#include "cuda/launcher.h"

namespace kvk::cuda {

// What ptxas says of a kernel; -1: not said.
struct Resources {
  int registers = -1;
  int stack_bytes = -1;  // local memory: spills, and arrays that did not fit registers
  int spill_store_bytes = -1;
  int spill_load_bytes = -1;
  int shared_bytes = 0;  // static
};

Resources resources(const std::string& compiler_log);

// 90 -> "sm_90a". From 9.0 on the architecture-specific target, which alone has wgmma and its successors. Throws for a card
// before 8.0.
std::string arch_name(int arch);

// Compiles, whatever the caches hold. Thread-safe.
Cubin compile(const Kernel& kernel, const std::string& arch);

enum class Origin { memory, shipped, disk, compiled };
const char* origin_name(Origin origin);

struct Compiled {
  std::shared_ptr<const Cubin> cubin;  // null: not in any cache, and compiling was not allowed
  Origin origin = Origin::memory;
  std::string key;
  double seconds = 0;  // this call took
};

enum class Missing { compile, leave };
Compiled get_cubin(const Kernel& kernel, const std::string& arch, Missing missing = Missing::compile);

// Cubins shipped with kvk serve whatever the NVRTC at hand, and without any. Folder "": none.
void set_shipped_cubins(const std::string& folder);
// Compiles into such a folder. Throws kvk::Error when it cannot be written.
Compiled ship_cubin(const Kernel& kernel, const std::string& arch, const std::string& folder);

}  // namespace kvk::cuda
