#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>

#include "kvk/api.h"

namespace kvk::cuda {
namespace {

constexpr int kMinimumVersion = 12000;  // of the cubins that the oldest NVRTC kvk takes makes

// Known as soon as the library is open, so that a failing cuInit is named, too.
std::atomic<CUresult (*)(CUresult, const char**)> error_name{nullptr}, error_string{nullptr};

std::string describe(std::atomic<CUresult (*)(CUresult, const char**)>& call, CUresult result) {
  const char* text = nullptr;
  const auto function = call.load();
  if (function == nullptr || function(result, &text) != 0 || text == nullptr) return {};
  return text;
}

// Errors that a kernel leaves behind: the context reports them from whatever call comes next.
bool left_by_a_kernel(CUresult result) {
  switch (result) {
    case 214:  // ECC_UNCORRECTABLE
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
      return true;
    default: return false;
  }
}

Driver open_driver() {
  const char* named = std::getenv("KVK_LIBCUDA");
  const std::string path = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    throw Error("kvk: no CUDA driver: " + std::string(why ? why : path) +
                ". kvk's CUDA kernels need an NVIDIA card and its driver, 525 or later (CUDA 12.0)");
  }
  Driver d;
#define KVK_LOAD_OPTIONAL(symbol, ...) \
  d.symbol.name = #symbol;             \
  d.symbol.function = reinterpret_cast<decltype(d.symbol.function)>(dlsym(library, #symbol));
#define KVK_LOAD(symbol, ...)                                                                                       \
  KVK_LOAD_OPTIONAL(symbol, __VA_ARGS__)                                                                            \
  if (d.symbol.function == nullptr) {                                                                               \
    throw Error("kvk: the CUDA driver " + path + " has no " #symbol ". kvk needs driver 525 or later (CUDA 12.0)"); \
  }
  KVK_DRIVER_CALLS(KVK_LOAD)
  KVK_OPTIONAL_DRIVER_CALLS(KVK_LOAD_OPTIONAL)
#undef KVK_LOAD
#undef KVK_LOAD_OPTIONAL
  error_name = d.cuGetErrorName.function;
  error_string = d.cuGetErrorString.function;

  d.cuInit({}, 0);
  d.cuDriverGetVersion({}, &d.version);
  if (d.version < kMinimumVersion) {
    throw Error("kvk: the CUDA driver is too old: it supports CUDA " + version_text(d.version) +
                ", kvk needs 12.0 or later (driver 525)");
  }
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

const Driver* driver_if_present() noexcept {
  try {
    return &driver();
  } catch (const Error&) {
    return nullptr;
  }
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_error(CUresult result) {
  const std::string name = describe(error_name, result), text = describe(error_string, result);
  return (name.empty() ? "an error without a name" : name) + " (" + std::to_string(result) +
         (text.empty() ? "" : ": " + text) + ")";
}

void fail_driver_call(const char* name, const Subject& subject, CUresult result, const std::string& more) {
  std::string text = std::string("kvk: ") + name + " failed with " + driver_error(result);
  if (subject.kernel != nullptr) text += std::string(", kernel ") + subject.kernel;
  if (subject.device >= 0) text += ", device cuda:" + std::to_string(subject.device);
  if (left_by_a_kernel(result)) {
    text +=
        ". A kernel that ran before, of kvk or of another library, failed on the card; nothing runs in this process "
        "any more. To find it: CUDA_LAUNCH_BLOCKING=1, KVK_CHECK=1, or compute-sanitizer";
  }
  throw Error(text + more);
}

}  // namespace kvk::cuda
