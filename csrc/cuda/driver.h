// The CUDA driver, opened at first use. The entry points kvk needs are declared here, as cuda.h declares them
// (tests/cuda/signatures.cc compares), so that neither building nor linking kvk takes anything of CUDA.
#pragma once

#include <cstddef>
#include <string>

namespace kvk::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

inline constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
inline constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
inline constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
inline constexpr int CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1;
inline constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
inline constexpr int CU_JIT_ERROR_LOG_BUFFER = 5;
inline constexpr int CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6;
inline constexpr int CU_STREAM_CAPTURE_STATUS_NONE = 0;
inline constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;
inline constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
inline constexpr CUresult CUDA_ERROR_INVALID_IMAGE = 200;
inline constexpr CUresult CUDA_ERROR_NO_BINARY_FOR_GPU = 209;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906;

// What a call is about, for its error.
struct Subject {
  int device = -1;
  const char* kernel = nullptr;
};

[[noreturn]] void fail_driver_call(const char* name, const Subject& subject, CUresult result, const std::string& more);

// One entry point. Calling it checks the result: kvk::Error names the call, the error and the subject.
template <class... Args>
struct DriverCall {
  const char* name = nullptr;
  CUresult (*function)(Args...) = nullptr;

  void operator()(const Subject& subject, Args... args) const {
    const CUresult result = function(args...);
    if (result != 0) fail(subject, result);
  }
  [[noreturn]] void fail(const Subject& subject, CUresult result, const std::string& more = {}) const {
    fail_driver_call(name, subject, result, more);
  }
};

// X(symbol, parameter types)
#define KVK_DRIVER_CALLS(X)                                                                                     \
  X(cuInit, unsigned)                                                                                           \
  X(cuDriverGetVersion, int*)                                                                                   \
  X(cuDeviceGetCount, int*)                                                                                     \
  X(cuDeviceGet, CUdevice*, int)                                                                                \
  X(cuDeviceGetName, char*, int, CUdevice)                                                                      \
  X(cuDeviceGetAttribute, int*, int, CUdevice)                                                                  \
  X(cuDevicePrimaryCtxRetain, CUcontext*, CUdevice)                                                             \
  X(cuCtxPushCurrent_v2, CUcontext)                                                                             \
  X(cuCtxPopCurrent_v2, CUcontext*)                                                                             \
  X(cuModuleLoadDataEx, CUmodule*, const void*, unsigned, int*, void**)                                         \
  X(cuModuleUnload, CUmodule)                                                                                   \
  X(cuModuleGetFunction, CUfunction*, CUmodule, const char*)                                                    \
  X(cuFuncGetAttribute, int*, int, CUfunction)                                                                  \
  X(cuFuncSetAttribute, CUfunction, int, int)                                                                   \
  X(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, \
    void**, void**)                                                                                             \
  X(cuStreamIsCapturing, CUstream, int*)                                                                        \
  X(cuThreadExchangeStreamCaptureMode, int*)                                                                    \
  X(cuStreamSynchronize, CUstream)                                                                              \
  X(cuMemcpyDtoHAsync_v2, void*, CUdeviceptr, size_t, CUstream)                                                 \
  X(cuGetErrorName, CUresult, const char**)                                                                     \
  X(cuGetErrorString, CUresult, const char**)

// CUDA 12.4 and later; null on older drivers.
#define KVK_OPTIONAL_DRIVER_CALLS(X) X(cuFuncGetParamInfo, CUfunction, size_t, size_t*, size_t*)

struct Driver {
#define KVK_MEMBER(symbol, ...) DriverCall<__VA_ARGS__> symbol;
  KVK_DRIVER_CALLS(KVK_MEMBER)
  KVK_OPTIONAL_DRIVER_CALLS(KVK_MEMBER)
#undef KVK_MEMBER
  int version = 0;  // of the CUDA that the driver supports, 1000 * major + 10 * minor
};

// The driver, initialised. Throws kvk::Error when there is none, when it is too old, or when it does not start; the next
// call then tries again.
const Driver& driver();

// The same, or null.
const Driver* driver_if_present() noexcept;

std::string version_text(int version);  // 12080 -> "12.8"

// "CUDA_ERROR_INVALID_VALUE (1: invalid argument)"
std::string driver_error(CUresult result);

}  // namespace kvk::cuda
