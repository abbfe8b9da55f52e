// torch's current CUDA stream, found at run time: no CUDA header, no link against libtorch_cuda or libcudart.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <string>

#include "kvk/api.h"

namespace kvk::torch_face {

// int aoti_torch_get_current_cuda_stream(int32_t device, void** stream), in libtorch_cuda since torch 2.9.
using CurrentCudaStream = int (*)(int32_t, void**);

// RTLD_NOLOAD asks for the copy that `import torch` has loaded, by SONAME; null with a CPU-only torch.
inline CurrentCudaStream find_current_cuda_stream() {
  static const CurrentCudaStream found = []() -> CurrentCudaStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentCudaStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

// Asked at every call: the current stream is a property of the calling thread.
inline void* current_cuda_stream(int32_t device) {
  const CurrentCudaStream find = find_current_cuda_stream();
  if (find == nullptr) throw Error("kvk: this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  if (find(device, &stream) != 0) {
    throw Error("kvk: torch reports no current CUDA stream for cuda:" + std::to_string(device));
  }
  return stream;
}

}  // namespace kvk::torch_face
