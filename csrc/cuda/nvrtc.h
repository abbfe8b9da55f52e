// NVRTC, CUDA's run-time compiler: the one that torch brought, found and opened at first use.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace kvk::cuda {

using nvrtcResult = int;
using nvrtcProgram = struct _nvrtcProgram*;

[[noreturn]] void fail_nvrtc_call(const char* name, const char* kernel, nvrtcResult result,
                                  const std::string& more = {});

// One entry point. Calling it checks the result: kvk::Error names the call, the error and the kernel.
template <class... Args>
struct NvrtcCall {
  const char* name = nullptr;
  nvrtcResult (*function)(Args...) = nullptr;

  void operator()(const char* kernel, Args... args) const {
    const nvrtcResult result = function(args...);
    if (result != 0) fail_nvrtc_call(name, kernel, result);
  }
};

// X(symbol, parameter types), as nvrtc.h declares them (tests/cuda/signatures.cc compares).
#define KVK_NVRTC_CALLS(X)                                                                                    \
  X(nvrtcVersion, int*, int*)                                                                                 \
  X(nvrtcGetNumSupportedArchs, int*)                                                                          \
  X(nvrtcGetSupportedArchs, int*)                                                                             \
  X(nvrtcCreateProgram, nvrtcProgram*, const char*, const char*, int, const char* const*, const char* const*) \
  X(nvrtcDestroyProgram, nvrtcProgram*)                                                                       \
  X(nvrtcAddNameExpression, nvrtcProgram, const char*)                                                        \
  X(nvrtcCompileProgram, nvrtcProgram, int, const char* const*)                                               \
  X(nvrtcGetProgramLogSize, nvrtcProgram, size_t*)                                                            \
  X(nvrtcGetProgramLog, nvrtcProgram, char*)                                                                  \
  X(nvrtcGetLoweredName, nvrtcProgram, const char*, const char**)                                             \
  X(nvrtcGetCUBINSize, nvrtcProgram, size_t*)                                                                 \
  X(nvrtcGetCUBIN, nvrtcProgram, char*)

struct Nvrtc {
#define KVK_MEMBER(symbol, ...) NvrtcCall<__VA_ARGS__> symbol;
  KVK_NVRTC_CALLS(KVK_MEMBER)
#undef KVK_MEMBER
  std::string path;
  long long file_size = 0;
  int major = 0, minor = 0;
  std::vector<int> archs;  // compute capabilities it compiles for, times ten

  std::string version() const { return std::to_string(major) + "." + std::to_string(minor); }
  // Tells builds of one version apart as well: two may generate different code.
  std::string build() const { return "NVRTC " + version() + ", " + std::to_string(file_size) + " bytes"; }
};

// Files where NVRTC may lie, best first; Python looks for them (kvk/cuda.py).
void set_nvrtc_candidates(std::vector<std::string> paths);

// $KVK_NVRTC alone if it is set; else the first that serves of: the NVRTC already in the process, the candidates, the
// loader's search path. One that is older than 12.0, or of a later CUDA major than the driver, does not serve. Throws
// kvk::Error that says what was tried.
const Nvrtc& nvrtc();

}  // namespace kvk::cuda
