#include "cuda/sources.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "cuda/sha256.h"
#include "kvk/api.h"

namespace kvk::cuda {
namespace {

std::shared_ptr<const DeviceSources> finish(DeviceSources sources) {
  std::sort(sources.files.begin(), sources.files.end());
  Sha256 hash;
  for (const auto& [name, text] : sources.files) {
    hash.field(name);
    hash.field(text);
  }
  sources.digest = hex(hash.finish());
  return std::make_shared<const DeviceSources>(std::move(sources));
}

std::shared_ptr<const DeviceSources> embedded() {
  DeviceSources sources;
  for (const EmbeddedSource* source = kEmbeddedSources; source->name != nullptr; ++source) {
    sources.files.emplace_back(source->name, source->text);
  }
  return finish(std::move(sources));
}

std::shared_ptr<const DeviceSources> read(const std::filesystem::path& root) {
  namespace fs = std::filesystem;
  DeviceSources sources;
  try {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(root / "kvk" / "device")) {
      const std::string extension = entry.path().extension();
      if (!entry.is_regular_file() || (extension != ".h" && extension != ".cuh")) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      std::ostringstream text;
      text << file.rdbuf();
      if (!file) throw Error("kvk: KVK_DEVICE_SOURCES: cannot read " + entry.path().string());
      sources.files.emplace_back(fs::relative(entry.path(), root).generic_string(), text.str());
    }
  } catch (const fs::filesystem_error& error) {
    throw Error(std::string("kvk: KVK_DEVICE_SOURCES must name a folder with kvk/device in it: ") + error.what());
  }
  return finish(std::move(sources));
}

}  // namespace

bool DeviceSources::has(const std::string& name) const {
  return std::any_of(files.begin(), files.end(), [&](const auto& file) { return file.first == name; });
}

std::shared_ptr<const DeviceSources> device_sources() {
  const char* folder = std::getenv("KVK_DEVICE_SOURCES");
  if (folder != nullptr && *folder != '\0') return read(folder);
  static const std::shared_ptr<const DeviceSources> carried = embedded();
  return carried;
}

}  // namespace kvk::cuda
