// How tests steer the fake driver and the fake NVRTC. Both are ordinary shared libraries that the runtime opens through
// KVK_LIBCUDA and KVK_NVRTC; a test opens the same file and finds these functions in it.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <string>

namespace test {

class FakeLibrary {
 public:
  FakeLibrary(const char* variable, const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    setenv(variable, path.c_str(), 1);
  }

 protected:
  template <class F>
  F symbol(const char* name) const {
    return reinterpret_cast<F>(dlsym(handle_, name));
  }

 private:
  void* handle_;
};

class FakeCuda : public FakeLibrary {
 public:
  explicit FakeCuda(const std::string& path) : FakeLibrary("KVK_LIBCUDA", path) {}

  // Every later call of this entry point returns `code`; 0 heals it.
  void fail(const char* call, int code) const { symbol<void (*)(const char*, int)>("fake_cuda_fail")(call, code); }
  // version, devices, capability, capture (CUstreamCaptureStatus), params_size, static_shared
  void set(const char* what, int value) const { symbol<void (*)(const char*, int)>("fake_cuda_set")(what, value); }
  // The calls since the last time this was asked, one a line: "cuLaunchKernel grid=1,2,3 block=...".
  std::string calls() const { return symbol<const char* (*)()>("fake_cuda_calls")(); }
  // What the last launch got as its parameter.
  std::string params() const { return symbol<const char* (*)()>("fake_cuda_params")(); }
  // This thread's: how many contexts are on its stack, and the mode of capture it is in.
  int context_depth() const { return symbol<int (*)()>("fake_cuda_context_depth")(); }
  int capture_mode() const { return symbol<int (*)()>("fake_cuda_capture_mode")(); }
  int modules() const { return symbol<int (*)()>("fake_cuda_modules")(); }
};

class FakeNvrtc : public FakeLibrary {
 public:
  // Version as FAKE_NVRTC_VERSION says, "12.8" without it.
  explicit FakeNvrtc(const std::string& path) : FakeLibrary("KVK_NVRTC", path) {}

  void fail(const char* call, int code) const { symbol<void (*)(const char*, int)>("fake_nvrtc_fail")(call, code); }
  int compiles() const { return symbol<int (*)()>("fake_nvrtc_compiles")(); }
};

}  // namespace test
