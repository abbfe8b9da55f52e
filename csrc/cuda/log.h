// The switches among the environment variables. KVK_LOG=1: one line on stderr for every compile, every load from the cache, and every cache that cannot be used.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

namespace kvk::cuda {

// Set, and not "0": how every switch among the environment variables is read.
inline bool environment_switch(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

// KVK_CHECK=1: values on a card are checked there, and every launch is waited for. Read once.
inline bool check_mode() {
  static const bool on = environment_switch("KVK_CHECK");
  return on;
}

template <class... Parts>
void log(const Parts&... parts) {
  if (!environment_switch("KVK_LOG")) return;
  std::ostringstream line;
  line << "kvk: ";
  (line << ... << parts) << '\n';
  const std::string text = line.str();
  std::fwrite(text.data(), 1, text.size(), stderr);  // one call, so that lines of several threads do not mix
}

}  // namespace kvk::cuda
