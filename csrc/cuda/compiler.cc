#include "cuda/compiler.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "cuda/log.h"
#include "cuda/nvrtc.h"
#include "cuda/sha256.h"
#include "cuda/sources.h"
#include "kvk/api.h"

namespace kvk::cuda {
namespace {

constexpr const char* kShippedProducer = "shipped";

// "sm_90a" -> 90; 0 for anything else.
int arch_number(const std::string& arch) {
  size_t end = 3;
  while (end < arch.size() && arch[end] >= '0' && arch[end] <= '9') ++end;
  const bool form =
      arch.compare(0, 3, "sm_") == 0 && end > 3 && end <= 6 && (arch.substr(end) == "" || arch.substr(end) == "a");
  return form ? std::atoi(arch.c_str() + 3) : 0;
}

// The number that stands directly before `words` in the line; -1: none.
int number_before(const std::string& line, const char* words) {
  const size_t end = line.find(words);
  if (end == std::string::npos) return -1;
  size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  return begin == end ? -1 : std::atoi(line.c_str() + begin);
}

int registers_in(const std::string& line) {
  int registers = -1;
  const size_t at = line.find("Used ");
  if (at != std::string::npos) std::sscanf(line.c_str() + at, "Used %d registers", &registers);
  return registers;
}

std::vector<std::string> options(const std::string& arch) {
  // -v makes ptxas report registers and spills; it does not change the code.
  std::vector<std::string> all = {"--gpu-architecture=" + arch, "--std=c++20", "--device-as-default-execution-space",
                                  "--ptxas-options=-v"};
  const char* more = std::getenv("KVK_NVRTC_FLAGS");
  std::istringstream words(more ? more : "");
  for (std::string word; words >> word;) all.push_back(word);
  return all;
}

// The name of a cubin: everything that decides its bytes.
std::string key_of(const Kernel& kernel, const std::string& arch, const std::string& producer,
                   const DeviceSources& sources) {
  Sha256 hash;
  for (const std::string& part : {std::string(kernel.header), kernel.expression, producer, sources.digest}) {
    hash.field(part);
  }
  for (const std::string& option : options(arch)) hash.field(option);
  return hex(hash.finish());
}

void require_arch(const Nvrtc& n, const Kernel& kernel, const std::string& arch) {
  const int number = arch_number(arch);
  if (number < 80) {
    throw Error("kvk: cannot compile " + kernel.expression + " for '" + arch +
                "': want sm_80 or later, such as sm_80, sm_90a, sm_100a, sm_120a");
  }
  if (std::find(n.archs.begin(), n.archs.end(), number) != n.archs.end()) return;
  std::string known;
  for (const int a : n.archs) known += (known.empty() ? "sm_" : ", sm_") + std::to_string(a);
  throw Error("kvk: NVRTC " + n.version() + " (" + n.path + ") cannot compile for " + arch + ", it knows " + known +
              (number >= 100 ? ". sm_100a and sm_120a need NVRTC 12.8 or later" : "") + "; kernel " +
              kernel.expression);
}

class Program {
 public:
  Program(const Nvrtc& n, const Kernel& kernel, const DeviceSources& sources) : n_(n) {
    const std::string text = std::string("#include \"") + kernel.header + "\"\n";
    std::vector<const char*> names, texts;
    for (const auto& [name, source] : sources.files) {
      names.push_back(name.c_str());
      texts.push_back(source.c_str());
    }
    n.nvrtcCreateProgram(kernel.expression.c_str(), &program_, text.c_str(), "kvk.cu", static_cast<int>(names.size()),
                         texts.data(), names.data());
  }
  ~Program() { n_.nvrtcDestroyProgram.function(&program_); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  nvrtcProgram get() const { return program_; }
  std::string log(const char* kernel) const {
    size_t size = 0;
    n_.nvrtcGetProgramLogSize(kernel, program_, &size);
    std::string text(size, '\0');
    if (size > 0) n_.nvrtcGetProgramLog(kernel, program_, text.data());
    return text.substr(0, text.find('\0'));
  }

 private:
  const Nvrtc& n_;
  nvrtcProgram program_ = nullptr;
};

Cubin compile_sources(const Kernel& kernel, const std::string& arch, const DeviceSources& sources) {
  const Nvrtc& n = nvrtc();
  require_arch(n, kernel, arch);
  if (!sources.has(kernel.header)) {
    throw Error(std::string("kvk: there is no device source ") + kernel.header + "; kernel " + kernel.expression);
  }
  const char* name = kernel.expression.c_str();
  const Program program(n, kernel, sources);
  n.nvrtcAddNameExpression(name, program.get(), name);
  std::vector<const char*> words;
  const std::vector<std::string> all = options(arch);
  for (const std::string& option : all) words.push_back(option.c_str());
  const nvrtcResult result =
      n.nvrtcCompileProgram.function(program.get(), static_cast<int>(words.size()), words.data());
  Cubin cubin;
  cubin.log = program.log(name);
  constexpr nvrtcResult kCompilation = 6;
  if (result == kCompilation) {
    throw Error("kvk: NVRTC " + n.version() + " does not compile " + kernel.expression + " for " + arch + ":\n" +
                cubin.log);
  }
  if (result != 0) {
    fail_nvrtc_call(n.nvrtcCompileProgram.name, name, result, cubin.log.empty() ? "" : ":\n" + cubin.log);
  }
  const char* lowered = nullptr;
  n.nvrtcGetLoweredName(name, program.get(), name, &lowered);
  cubin.lowered_name = lowered;
  size_t size = 0;
  n.nvrtcGetCUBINSize(name, program.get(), &size);
  cubin.image.resize(size);
  n.nvrtcGetCUBIN(name, program.get(), cubin.image.data());
  return cubin;
}

// The cubins that this process has seen, for all cards together.
struct Memory {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<const Cubin>> cubins;
  std::string shipped;

  std::shared_ptr<const Cubin> find(const std::string& key) {
    const std::lock_guard lock(mutex);
    const auto at = cubins.find(key);
    return at == cubins.end() ? nullptr : at->second;
  }
  std::shared_ptr<const Cubin> keep(const std::string& key, Cubin cubin) {
    const std::lock_guard lock(mutex);
    return cubins.try_emplace(key, std::make_shared<const Cubin>(std::move(cubin))).first->second;
  }
  std::string shipped_folder() {
    const std::lock_guard lock(mutex);
    return shipped;
  }
};

Memory& memory() {
  static Memory* const instance = new Memory;  // outlives every static that may still launch at exit
  return *instance;
}

// Looks in memory, then in a folder. False: neither has it.
bool look_up(Compiled& found, const std::string& folder, Origin origin) {
  found.origin = Origin::memory;
  found.cubin = memory().find(found.key);
  if (found.cubin != nullptr) return true;
  std::optional<Cubin> stored = load_cubin(folder, found.key);
  if (!stored) return false;
  found.origin = origin;
  found.cubin = memory().keep(found.key, std::move(*stored));
  return true;
}

void search(Compiled& found, const Kernel& kernel, const std::string& arch, Missing missing) {
  const auto sources = device_sources();
  if (const std::string shipped = memory().shipped_folder(); !shipped.empty()) {
    found.key = key_of(kernel, arch, kShippedProducer, *sources);
    if (look_up(found, shipped, Origin::shipped)) return;
  }
  found.key = key_of(kernel, arch, nvrtc().build(), *sources);
  const std::string folder = cache_folder();
  if (look_up(found, folder, Origin::disk)) return;
  if (missing == Missing::leave) return;
  found.origin = Origin::compiled;
  found.cubin = memory().keep(found.key, compile_sources(kernel, arch, *sources));
  store_cubin(folder, found.key, *found.cubin);
}

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void log_result(const Compiled& found, const Kernel& kernel, const std::string& arch) {
  const Resources used = resources(found.cubin->log);
  log(origin_name(found.origin), ": ", kernel.expression, " for ", arch, " in ", found.seconds, " s, ", used.registers,
      " registers, ", used.spill_store_bytes, " bytes spilled, ", used.stack_bytes, " bytes of local memory");
}

}  // namespace

Resources resources(const std::string& compiler_log) {
  Resources all;
  std::istringstream lines(compiler_log);
  for (std::string line; std::getline(lines, line);) {
    if (const int used = registers_in(line); used >= 0) {
      all.registers = used;
      all.shared_bytes = std::max(0, number_before(line, " bytes smem"));
    }
    // One line for the kernel, and one for every function of it that was not inlined.
    if (const int stack = number_before(line, " bytes stack frame"); stack >= 0) {
      all.stack_bytes = std::max(all.stack_bytes, 0) + stack;
      all.spill_store_bytes = std::max(all.spill_store_bytes, 0) + number_before(line, " bytes spill stores");
      all.spill_load_bytes = std::max(all.spill_load_bytes, 0) + number_before(line, " bytes spill loads");
    }
  }
  return all;
}

std::string arch_name(int arch) {
  if (arch < 80) {
    throw Error("kvk: the card has compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10) +
                ", kvk's CUDA kernels need 8.0 or later");
  }
  return "sm_" + std::to_string(arch) + (arch >= 90 ? "a" : "");
}

const char* origin_name(Origin origin) {
  switch (origin) {
    case Origin::memory: return "memory";
    case Origin::shipped: return "shipped";
    case Origin::disk: return "cache";
    case Origin::compiled: break;
  }
  return "compiled";
}

Cubin compile(const Kernel& kernel, const std::string& arch) {
  return compile_sources(kernel, arch, *device_sources());
}

Compiled get_cubin(const Kernel& kernel, const std::string& arch, Missing missing) {
  const Stopwatch watch;
  Compiled found;
  search(found, kernel, arch, missing);
  found.seconds = watch.seconds();
  if (found.cubin != nullptr) log_result(found, kernel, arch);
  return found;
}

void set_shipped_cubins(const std::string& folder) {
  const std::lock_guard lock(memory().mutex);
  memory().shipped = folder;
}

Compiled ship_cubin(const Kernel& kernel, const std::string& arch, const std::string& folder) {
  const Stopwatch watch;
  Compiled made;
  const auto sources = device_sources();
  made.key = key_of(kernel, arch, kShippedProducer, *sources);
  made.origin = Origin::compiled;
  made.cubin = std::make_shared<const Cubin>(compile_sources(kernel, arch, *sources));
  if (!store_cubin(folder, made.key, *made.cubin)) throw Error("kvk: cannot write cubins to " + folder);
  made.seconds = watch.seconds();
  log_result(made, kernel, arch);
  return made;
}

}  // namespace kvk::cuda
