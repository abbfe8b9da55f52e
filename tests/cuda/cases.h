// Cases of the CUDA runtime's test program. Each runs in a process of its own, since the runtime opens the driver and NVRTC
// once a process: `kvk_test_cuda NAME`; `--list` prints the names.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "../cpp/testing.h"
#include "cuda/compiler.h"
#include "cuda/driver_launcher.h"
#include "fakes.h"

namespace test {

inline std::map<std::string, std::function<void()>>& cases() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}

struct Case {
  Case(const char* name, std::function<void()> body) { cases().emplace(name, std::move(body)); }
};

#define KVK_CASE(name)                                     \
  static void case_##name();                               \
  static const Case registered_##name(#name, case_##name); \
  static void case_##name()

// Built beside the program.
inline std::string library(const std::string& name) {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / ("lib" + name + ".so")).string();
}

// A folder of this process, gone when the object goes.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvk-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string path() const { return path_.string(); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  int count(const std::string& extension) const {
    int n = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) n += entry.path().extension() == extension;
    return n;
  }

 private:
  std::filesystem::path path_;
};

// A cache of its own for a case.
struct TemporaryCache : TemporaryFolder {
  TemporaryCache() { setenv("KVK_CACHE", path().c_str(), 1); }
};

inline void check_has(const std::string& text, const std::string& part, const std::string& what) {
  check(text.find(part) != std::string::npos, what + ": \"" + part + "\" is not in \"" + text + "\"");
}
inline void check_lacks(const std::string& text, const std::string& part, const std::string& what) {
  check(text.find(part) == std::string::npos, what + ": \"" + part + "\" is in \"" + text + "\"");
}

// What stderr got while `body` ran.
std::string stderr_of(const std::function<void()>& body);

inline kvk::cuda::Kernel kernel(int number) {
  return {"kvk/device/probe.cuh", "kvk::device::probe<" + std::to_string(number) + ">"};
}

// Both fakes, and an empty cache.
struct Fakes {
  TemporaryCache cache;
  FakeCuda cuda{library("kvk_fake_cuda")};
  FakeNvrtc nvrtc{library("kvk_fake_nvrtc")};
};

}  // namespace test
