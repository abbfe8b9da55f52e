// Kernels by the name that the launch code gives NVRTC.
#include <algorithm>
#include <map>

#include "emulator/emulator.h"

namespace kvk::emu {
namespace {

std::string without_blanks(std::string text) {
  text.erase(std::remove_if(text.begin(), text.end(), [](char c) { return c == ' ' || c == '\n' || c == '\t'; }),
             text.end());
  return text;
}

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> map;
  return map;
}

}  // namespace

RegisterKernel::RegisterKernel(const Kernel& kernel) { kernels().emplace(without_blanks(kernel.name), kernel); }

std::vector<std::string> known_kernels() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kernels()) names.push_back(name);
  return names;
}

void launch_by_name(const std::string& expression, const LaunchConfig& config, const void* params,
                    size_t params_bytes) {
  const auto found = kernels().find(without_blanks(expression));
  if (found == kernels().end()) {
    throw Error("unknown-kernel", "no kernel " + expression + " in this binary; it needs a line KVK_EMULATED_KERNEL(" +
                                      expression + ");");
  }
  if (found->second.params_bytes != params_bytes) {
    throw Error("launch", expression + " takes " + std::to_string(found->second.params_bytes) +
                              " bytes of parameters, the launch gives " + std::to_string(params_bytes));
  }
  launch(found->second, config, params);
}

}  // namespace kvk::emu
