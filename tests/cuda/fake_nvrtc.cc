// An NVRTC that compiles nothing: its "cubin" is a text of the request. FAKE_NVRTC_VERSION is its version; fakes.h steers it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Program {
  std::string text, expression, lowered, cubin, log;
};

std::mutex mutex;
std::map<std::string, int> failures;
int compile_count = 0;

int code_of(const char* call) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = failures.find(call);
  return at == failures.end() ? 0 : at->second;
}

#define FAKE_ENTER() \
  if (const int code = code_of(__func__)) return code

void version(int& major, int& minor) {
  const char* text = std::getenv("FAKE_NVRTC_VERSION");
  std::sscanf(text ? text : "12.8", "%d.%d", &major, &minor);
}

std::vector<int> archs() {
  int major = 0, minor = 0;
  version(major, minor);
  std::vector<int> all = {75, 80, 86, 89, 90};
  if (major * 100 + minor >= 1208) all.insert(all.end(), {100, 120});
  return all;
}

}  // namespace

extern "C" {

void fake_nvrtc_fail(const char* call, int code) {
  const std::lock_guard<std::mutex> lock(mutex);
  failures[call] = code;
}
int fake_nvrtc_compiles() {
  const std::lock_guard<std::mutex> lock(mutex);
  return compile_count;
}

const char* nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_FAKE"; }
int nvrtcVersion(int* major, int* minor) {
  FAKE_ENTER();
  version(*major, *minor);
  return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
  FAKE_ENTER();
  *count = static_cast<int>(archs().size());
  return 0;
}
int nvrtcGetSupportedArchs(int* list) {
  FAKE_ENTER();
  const std::vector<int> all = archs();
  std::memcpy(list, all.data(), all.size() * sizeof(int));
  return 0;
}
int nvrtcCreateProgram(Program** program, const char* text, const char*, int count, const char* const*,
                       const char* const* names) {
  FAKE_ENTER();
  *program = new Program{text, {}, {}, {}, {}};
  for (int i = 0; i < count; ++i) (*program)->text += std::string("with ") + names[i] + "\n";
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return 0;
}
int nvrtcAddNameExpression(Program* program, const char* expression) {
  FAKE_ENTER();
  program->expression = expression;
  return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    ++compile_count;
  }
  program->log = "line one of the log\n";
  FAKE_ENTER();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  program->lowered = "lowered(" + program->expression + ")";
  program->cubin = "cubin of " + program->lowered + "\n" + program->text;
  for (int i = 0; i < count; ++i) program->cubin += std::string(options[i]) + "\n";
  program->log += "ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem\n";
  return 0;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  FAKE_ENTER();
  *size = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
  FAKE_ENTER();
  std::memcpy(log, program->log.c_str(), program->log.size() + 1);
  return 0;
}
int nvrtcGetLoweredName(Program* program, const char* expression, const char** name) {
  FAKE_ENTER();
  if (program->expression != expression) return 10;
  *name = program->lowered.c_str();
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  FAKE_ENTER();
  *size = program->cubin.size() + 1;
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* cubin) {
  FAKE_ENTER();
  std::memcpy(cubin, program->cubin.c_str(), program->cubin.size() + 1);
  return 0;
}
}
