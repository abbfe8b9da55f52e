// A driver without a card: the entry points kvk uses, with the rules of the real one that kvk must keep (a function runs in
// its own context only, shared memory above 48 KiB must be allowed first, no module is loaded during a capture unless
// the thread has relaxed it). Records every call; fakes.h steers it.
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
              kCaptureUnsupported = 900;

struct Context {
  int device;
};
struct Module {
  Context* context;
  std::string image;
};
struct Function {
  Module* module;
  std::string name;
  int dynamic_limit;
};

std::mutex mutex;
std::map<std::string, int> failures;
std::map<std::string, int> settings = {{"version", 12080}, {"devices", 2},     {"capability", 90},
                                       {"capture", 0},     {"params_size", 8}, {"static_shared", 0}};
std::string log_text, answer, last_params;
Context contexts[64];
std::vector<std::unique_ptr<Function>> functions;
std::map<Module*, std::unique_ptr<Module>> modules;
thread_local std::vector<Context*> stack;
thread_local int capture_mode = 0;

int setting(const char* what) { return settings.at(what); }

// Notes the call; the code it is to fail with, or 0. The mutex is held.
int enter(const char* call, const std::string& arguments = {}) {
  log_text += call + (arguments.empty() ? "" : " " + arguments) + "\n";
  const auto at = failures.find(call);
  return at == failures.end() ? 0 : at->second;
}

#define FAKE_ENTER(...)                          \
  const std::lock_guard<std::mutex> lock(mutex); \
  if (const int code = enter(__func__ __VA_OPT__(, ) __VA_ARGS__)) return code

}  // namespace

extern "C" {

void fake_cuda_fail(const char* call, int code) {
  const std::lock_guard<std::mutex> lock(mutex);
  failures[call] = code;
}
void fake_cuda_set(const char* what, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  settings.at(what) = value;
}
const char* fake_cuda_calls() {
  const std::lock_guard<std::mutex> lock(mutex);
  answer.swap(log_text);
  log_text.clear();
  return answer.c_str();
}
const char* fake_cuda_params() { return last_params.c_str(); }
int fake_cuda_context_depth() { return static_cast<int>(stack.size()); }
int fake_cuda_capture_mode() { return capture_mode; }
int fake_cuda_modules() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(modules.size());
}

int cuInit(unsigned flags) {
  FAKE_ENTER();
  return flags == 0 ? 0 : kInvalidValue;
}
int cuDriverGetVersion(int* version) {
  FAKE_ENTER();
  *version = setting("version");
  return 0;
}
int cuDeviceGetCount(int* count) {
  FAKE_ENTER();
  *count = setting("devices");
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  FAKE_ENTER();
  if (ordinal < 0 || ordinal >= setting("devices")) return kInvalidDevice;
  *device = 100 + ordinal;  // a handle, not the ordinal
  return 0;
}
int cuDeviceGetName(char* name, int length, int device) {
  FAKE_ENTER();
  std::snprintf(name, static_cast<size_t>(length), "Fake %d", device - 100);
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  FAKE_ENTER();
  if (device < 100) return kInvalidDevice;
  switch (attribute) {
    case 16: *value = 132; return 0;
    case 75: *value = setting("capability") / 10; return 0;
    case 76: *value = setting("capability") % 10; return 0;
    case 97: *value = 232448; return 0;
    default: return kInvalidValue;
  }
}
int cuDevicePrimaryCtxRetain(Context** context, int device) {
  FAKE_ENTER();
  if (device < 100) return kInvalidDevice;
  *context = &contexts[device - 100];
  (*context)->device = device - 100;
  return 0;
}
int cuCtxPushCurrent_v2(Context* context) {
  FAKE_ENTER("device=" + std::to_string(context->device));
  stack.push_back(context);
  return 0;
}
int cuCtxPopCurrent_v2(Context** context) {
  FAKE_ENTER();
  if (stack.empty()) return kInvalidContext;
  *context = stack.back();
  stack.pop_back();
  return 0;
}
int cuModuleLoadDataEx(Module** module, const void* image, unsigned count, int* options, void** values) {
  FAKE_ENTER();
  if (stack.empty()) return kInvalidContext;
  if (count != 2 || options[0] != 5 || options[1] != 6) return kInvalidValue;
  if (setting("capture") != 0 && capture_mode != 2) {
    std::snprintf(static_cast<char*>(values[0]), reinterpret_cast<size_t>(values[1]), "loading during a capture");
    settings["capture"] = 2;
    return kCaptureUnsupported;
  }
  auto made = std::make_unique<Module>(Module{stack.back(), static_cast<const char*>(image)});
  *module = made.get();
  modules.emplace(*module, std::move(made));
  return 0;
}
int cuModuleUnload(Module* module) {
  FAKE_ENTER();
  return modules.erase(module) == 1 ? 0 : kInvalidHandle;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  FAKE_ENTER(name);
  if (module->image.find(name) == std::string::npos) return kNotFound;
  functions.push_back(std::make_unique<Function>(Function{module, name, 49152 - setting("static_shared")}));
  *function = functions.back().get();
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, Function* function) {
  FAKE_ENTER();
  if (function == nullptr || attribute != 1) return kInvalidValue;
  *value = setting("static_shared");
  return 0;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
  FAKE_ENTER(std::to_string(attribute) + "=" + std::to_string(value));
  if (attribute != 8 || value < 0 || value + setting("static_shared") > 232448) return kInvalidValue;
  function->dynamic_limit = value;
  return 0;
}
#if !defined(FAKE_OLD)
int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
  FAKE_ENTER();
  if (function == nullptr || index != 0) return kInvalidValue;
  *offset = 0;
  *size = static_cast<size_t>(setting("params_size"));
  return 0;
}
#endif
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  char text[256];
  std::snprintf(text, sizeof text, "%s device=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p",
                function->name.c_str(), function->module->context->device, gx, gy, gz, bx, by, bz, shared, stream);
  FAKE_ENTER(text);
  if (stack.empty() || stack.back() != function->module->context) return kInvalidHandle;
  if (static_cast<int>(shared) > function->dynamic_limit || extra != nullptr || params == nullptr) return kInvalidValue;
  if (gx * gy * gz == 0) return kInvalidValue;
  last_params.assign(static_cast<const char*>(params[0]), static_cast<size_t>(setting("params_size")));
  return 0;
}
#if !defined(FAKE_INCOMPLETE)
int cuStreamIsCapturing(void*, int* status) {
  FAKE_ENTER();
  *status = setting("capture");
  return 0;
}
#endif
int cuThreadExchangeStreamCaptureMode(int* mode) {
  FAKE_ENTER(std::to_string(*mode));
  std::swap(*mode, capture_mode);
  return 0;
}
int cuStreamSynchronize(void*) {
  FAKE_ENTER();
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* host, unsigned long long device, size_t bytes, void*) {
  FAKE_ENTER(std::to_string(bytes));
  if (stack.empty()) return kInvalidContext;
  if (setting("capture") != 0) return kCaptureUnsupported;
  std::memcpy(host, reinterpret_cast<const void*>(device), bytes);  // the card's memory is the test's own
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  thread_local std::string text;
  text = "FAKE_ERROR_" + std::to_string(code);
  *name = text.c_str();
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "as the test wants it";
  return 0;
}
}
