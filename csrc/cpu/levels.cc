#include "cpu/levels.h"

#include <cstdlib>
#include <cstring>

#include "kvk/api.h"

namespace kvk {
namespace cpu {
namespace {

bool machine_has(const Kernels& level) {
#if defined(__x86_64__)
  if (std::strcmp(level.name, "x86-64-v4") == 0) return __builtin_cpu_supports("x86-64-v4");
  if (std::strcmp(level.name, "x86-64-v3") == 0) return __builtin_cpu_supports("x86-64-v3");
#endif
  return &level == &kvk_cpu_kernels_base;
}

const Kernels& choose() {
  static const Kernels* const levels[] = {
#if defined(KVK_HAVE_X86_64_V4)
      &kvk_cpu_kernels_x86_64_v4,
#endif
#if defined(KVK_HAVE_X86_64_V3)
      &kvk_cpu_kernels_x86_64_v3,
#endif
      &kvk_cpu_kernels_base,
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* asked = std::getenv("KVK_CPU_LEVEL");
  if (asked != nullptr && *asked == '\0') asked = nullptr;
  std::string available;
  for (const Kernels* level : levels) {
    if (!machine_has(*level)) continue;
    if (asked == nullptr || std::strcmp(asked, level->name) == 0) return *level;
    available += std::string(available.empty() ? "" : ", ") + level->name;
  }
  throw Error("kvk: KVK_CPU_LEVEL asks for '" + std::string(asked ? asked : "") +
              "'; this build has on this machine: " + available);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace cpu

const char* cpu_level() { return cpu::kernels().name; }

#define KVK_TEXT_(x) #x
#define KVK_TEXT(x) KVK_TEXT_(x)
const char* version() {
  return KVK_TEXT(KVK_VERSION_MAJOR) "." KVK_TEXT(KVK_VERSION_MINOR) "." KVK_TEXT(KVK_VERSION_PATCH);
}

}  // namespace kvk
