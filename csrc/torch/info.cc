// What `python -m kvk info` prints of the library, as one C function: Python asks for it with ctypes.
#include <string>

#include "kvk/api.h"

namespace {

std::string level_in_use() {
  try {
    return kvk::cpu_level();
  } catch (const kvk::Error& error) {  // KVK_CPU_LEVEL asks for one that is not there
    return error.what();
  }
}

std::string text() {
  std::string text;
  text += std::string("version=") + kvk::version() + "\n";
  text += "cpu_level=" + level_in_use() + "\n";
  text += "cpu_levels=" KVK_LEVEL_NAMES "\n";
  text += "compiler=" KVK_COMPILER "\n";
  text += "torch_headers=" KVK_TORCH_HEADERS "\n";
  return text;
}

}  // namespace

// Lines of key=value; the text lives as long as the library.
extern "C" KVK_API const char* kvk_build_info() {
  static const std::string info = text();
  return info.c_str();
}
