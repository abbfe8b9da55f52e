// The text of include/kvk/device, carried in the library (cmake/device_sources.cmake).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace kvk::cuda {

struct EmbeddedSource {
  const char* name;  // as #include writes it, "kvk/device/types.h"
  const char* text;
};

// Generated; sorted by name, ends with {nullptr, nullptr}.
extern const EmbeddedSource kEmbeddedSources[];

struct DeviceSources {
  std::vector<std::pair<std::string, std::string>> files;  // name, text
  std::string digest;                                      // SHA-256 over all of it, in hexadecimal

  bool has(const std::string& name) const;
};

// The embedded sources; or, for those who write kernels, the files under $KVK_DEVICE_SOURCES/kvk/device as they are now.
std::shared_ptr<const DeviceSources> device_sources();

}  // namespace kvk::cuda
