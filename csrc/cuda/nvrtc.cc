#include "cuda/nvrtc.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <sstream>

#include "cuda/driver.h"
#include "cuda/log.h"
#include "kvk/api.h"

namespace kvk::cuda {
namespace {

constexpr int kMinimumMajor = 12;  // sm_90a, C++20

// An NVRTC 11 is looked for, too, so that the error can name it.
constexpr const char* kNames[] = {"libnvrtc.so.15", "libnvrtc.so.14", "libnvrtc.so.13", "libnvrtc.so.12",
                                  "libnvrtc.so.11.2"};

std::mutex mutex;  // guards the two below
std::vector<std::string> candidates;
std::optional<Nvrtc> chosen;

std::atomic<const char* (*)(nvrtcResult)> error_string{nullptr};

// The NVRTC in an open library, or why it does not serve.
std::optional<Nvrtc> examine(void* library, const std::string& path, std::string& why_not) {
  Nvrtc n;
#define KVK_LOAD(symbol, ...)                                                                 \
  n.symbol.name = #symbol;                                                                    \
  n.symbol.function = reinterpret_cast<decltype(n.symbol.function)>(dlsym(library, #symbol)); \
  if (n.symbol.function == nullptr) {                                                         \
    why_not = "has no " #symbol;                                                              \
    return std::nullopt;                                                                      \
  }
  KVK_NVRTC_CALLS(KVK_LOAD)
#undef KVK_LOAD
  error_string = reinterpret_cast<const char* (*)(nvrtcResult)>(dlsym(library, "nvrtcGetErrorString"));
  Dl_info file;
  const bool known = dladdr(reinterpret_cast<void*>(n.nvrtcVersion.function), &file) != 0 && file.dli_fname != nullptr;
  n.path = known ? file.dli_fname : path;
  struct stat status;
  if (::stat(n.path.c_str(), &status) == 0) n.file_size = status.st_size;
  n.nvrtcVersion(nullptr, &n.major, &n.minor);
  if (n.major < kMinimumMajor) {
    why_not = "is version " + n.version() + ", kvk needs 12.0 or later";
    return std::nullopt;
  }
  if (const Driver* d = driver_if_present(); d != nullptr && n.major > d->version / 1000) {
    why_not = "is version " + n.version() + ", and the driver supports only CUDA " + version_text(d->version);
    return std::nullopt;
  }
  int count = 0;
  n.nvrtcGetNumSupportedArchs(nullptr, &count);
  n.archs.resize(static_cast<size_t>(count));
  n.nvrtcGetSupportedArchs(nullptr, n.archs.data());
  return n;
}

Nvrtc find() {
  std::ostringstream tried;
  std::optional<Nvrtc> found;
  const auto attempt = [&](const std::string& path, int flags) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
    if (library != nullptr) {
      std::string why_not;
      found = examine(library, path, why_not);
      if (!found) tried << "\n  " << path << ' ' << why_not;
    } else if ((flags & RTLD_NOLOAD) == 0) {
      const char* why_not = dlerror();  // names the path
      tried << "\n  " << (why_not ? why_not : path.c_str());
    }
    return found.has_value();
  };

  const char* named = std::getenv("KVK_NVRTC");
  if (named != nullptr && *named != '\0') {
    if (attempt(named, 0)) return *found;
    throw Error("kvk: the NVRTC that KVK_NVRTC names does not serve:" + tried.str());
  }
  for (const char* name : kNames) {
    if (attempt(name, RTLD_NOLOAD)) return *found;
  }
  for (const std::string& path : candidates) {
    if (attempt(path, 0)) return *found;
  }
  for (const char* name : kNames) {
    if (attempt(name, 0)) return *found;
  }
  throw Error(
      "kvk: no NVRTC 12.0 or later. It comes with CUDA builds of torch; alone: pip install nvidia-cuda-nvrtc "
      "(CUDA 13) or nvidia-cuda-nvrtc-cu12. Or set KVK_NVRTC to the file of libnvrtc. Tried:" +
      tried.str());
}

}  // namespace

void set_nvrtc_candidates(std::vector<std::string> paths) {
  const std::lock_guard lock(mutex);
  candidates = std::move(paths);
}

const Nvrtc& nvrtc() {
  const std::lock_guard lock(mutex);
  if (!chosen) {
    chosen = find();
    log("NVRTC ", chosen->version(), " from ", chosen->path);
  }
  return *chosen;  // never changed again
}

void fail_nvrtc_call(const char* name, const char* kernel, nvrtcResult result, const std::string& more) {
  constexpr nvrtcResult kBuiltinOperationFailure = 7;
  const auto describe = error_string.load();
  std::string text = std::string("kvk: ") + name + " failed with " +
                     (describe ? describe(result) : "an error without a name") + " (" + std::to_string(result) + ")";
  if (kernel != nullptr) text += std::string(", kernel ") + kernel;
  if (result == kBuiltinOperationFailure) text += ". Is libnvrtc-builtins beside the libnvrtc in use?";
  throw Error(text + more);
}

}  // namespace kvk::cuda
