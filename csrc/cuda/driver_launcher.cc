#include "cuda/driver_launcher.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <unordered_map>

#include "core/explain.h"
#include "cuda/compiler.h"
#include "cuda/log.h"
#include "cuda/nvrtc.h"
#include "kvk/api.h"

namespace kvk::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr size_t kDefaultShared = 48 * 1024;  // per block, static and dynamic, unless a kernel is allowed more

// A kernel in a card's primary context. Never unloaded: launches may come until the process ends.
struct Function {
  CUfunction handle = nullptr;
  size_t static_shared = 0;
  size_t params_size = 0;                    // 0: the driver is too old to tell
  std::atomic<size_t> dynamic_shared_limit;  // what the driver has been told to allow
};

}  // namespace

struct DeviceState {
  int index = 0;
  CUdevice device = 0;
  CUcontext context = nullptr;
  DeviceDescription description;
  std::shared_mutex functions_mutex;
  std::unordered_map<std::string, std::unique_ptr<Function>> functions;
  std::mutex loading;  // one kernel at a time is compiled and loaded for a card
  std::mutex limits;
};

namespace {

// Makes a card's primary context current, the one that torch and the CUDA runtime use, and takes it away again.
class CurrentContext {
 public:
  CurrentContext(const DeviceState& state, const Subject& subject) : subject_(subject) {
    driver().cuCtxPushCurrent_v2(subject, state.context);
  }
  ~CurrentContext() {
    CUcontext ours = nullptr;
    if (!popped_) driver().cuCtxPopCurrent_v2.function(&ours);  // an error is already on its way
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  void pop() {
    popped_ = true;
    CUcontext ours = nullptr;
    driver().cuCtxPopCurrent_v2(subject_, &ours);
  }

 private:
  Subject subject_;
  bool popped_ = false;
};

// Lets this thread make calls that the driver forbids by default while any thread captures a stream. Loading a module is
// one; it does not touch the captured stream.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Subject& subject) : subject_(subject) {
    driver().cuThreadExchangeStreamCaptureMode(subject, &mode_);
  }
  ~RelaxedCapture() {
    if (!restored_) driver().cuThreadExchangeStreamCaptureMode.function(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  void restore() {
    restored_ = true;
    driver().cuThreadExchangeStreamCaptureMode(subject_, &mode_);
  }

 private:
  Subject subject_;
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  bool restored_ = false;
};

DeviceDescription describe(CUdevice device, int index) {
  const Driver& d = driver();
  const Subject subject{index};
  DeviceDescription description;
  char name[256] = {};
  d.cuDeviceGetName(subject, name, static_cast<int>(sizeof name) - 1, device);
  description.name = name;
  const auto attribute = [&](int which) {
    int value = 0;
    d.cuDeviceGetAttribute(subject, &value, which, device);
    return value;
  };
  description.properties.arch = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                                attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  description.properties.num_sms = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  description.properties.max_shared_per_block = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  return description;
}

std::unique_ptr<DeviceState> open_device(int index) {
  const Driver& d = driver();
  int count = 0;
  d.cuDeviceGetCount({index}, &count);
  if (index < 0 || index >= count || index >= kMaxDevices) {
    throw Error("kvk: there is no device cuda:" + std::to_string(index) + ", the driver sees " + std::to_string(count) +
                (count == 1 ? " card" : " cards"));
  }
  auto state = std::make_unique<DeviceState>();
  state->index = index;
  d.cuDeviceGet({index}, &state->device, index);
  state->description = describe(state->device, index);
  try {
    arch_name(state->description.properties.arch);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + "; cuda:" + std::to_string(index) + " is " + state->description.name);
  }
  d.cuDevicePrimaryCtxRetain({index}, &state->context, state->device);
  return state;
}

DeviceState& device_state(int index) {
  static std::array<std::atomic<DeviceState*>, kMaxDevices> states{};
  static std::mutex mutex;
  if (index >= 0 && index < kMaxDevices) {
    if (DeviceState* known = states[static_cast<size_t>(index)].load(std::memory_order_acquire)) return *known;
  }
  const std::lock_guard lock(mutex);
  if (index >= 0 && index < kMaxDevices) {
    if (DeviceState* known = states[static_cast<size_t>(index)].load(std::memory_order_acquire)) return *known;
  }
  DeviceState* opened = open_device(index).release();  // for the life of the process, as its kernels are
  states[static_cast<size_t>(index)].store(opened, std::memory_order_release);
  return *opened;
}

bool capturing(CUstream stream, const Subject& subject) {
  const auto& query = driver().cuStreamIsCapturing;
  int status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = query.function(stream, &status);
  // The default stream, while another stream is captured: the capture forbids the same things.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return true;
  if (result != 0) query.fail(subject, result);
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

CUmodule load_module(const Compiled& compiled, const DeviceState& state, const Subject& subject, bool in_capture) {
  const Driver& d = driver();
  char text[2048] = {};
  int options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
  void* values[] = {text, reinterpret_cast<void*>(sizeof text - 1)};
  CUmodule module = nullptr;
  const CUresult result = d.cuModuleLoadDataEx.function(&module, compiled.cubin->image.data(), 2, options, values);
  if (result == 0) return module;
  std::string more;
  if (result == CUDA_ERROR_INVALID_IMAGE || result == CUDA_ERROR_NO_BINARY_FOR_GPU) {
    more = ". The driver, of CUDA " + version_text(d.version) + ", does not take the code (" +
           origin_name(compiled.origin) + ", for " + arch_name(state.description.properties.arch) + ")";
  } else if (in_capture &&
             (result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED || result == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)) {
    more =
        ". This driver cannot load a kernel while a CUDA graph is being captured (12.3 and later can): run the op once "
        "before the capture, or call kvk.precompile() in this process";
  }
  if (text[0] != '\0') more += std::string("\n") + text;
  d.cuModuleLoadDataEx.fail(subject, result, more);
}

// With the card's context current.
std::unique_ptr<Function> prepare(const DeviceState& state, const Kernel& kernel, CUstream stream) {
  const Driver& d = driver();
  const Subject subject{state.index, kernel.expression.c_str()};
  const std::string arch = arch_name(state.description.properties.arch);
  const bool in_capture = capturing(stream, subject);
  const Compiled compiled = get_cubin(kernel, arch, in_capture ? Missing::leave : Missing::compile);
  if (compiled.cubin == nullptr) {
    throw Error("kvk: " + kernel.expression + " is not compiled for cuda:" + std::to_string(state.index) + " (" + arch +
                ") yet, and nothing is compiled while a CUDA graph is being captured. Run the op once before the "
                "capture, or call kvk.precompile() first (python -m kvk precompile --arch " +
                arch + ")");
  }

  auto function = std::make_unique<Function>();
  RelaxedCapture relaxed(subject);
  const CUmodule module = load_module(compiled, state, subject, in_capture);
  try {
    int static_shared = 0;
    d.cuModuleGetFunction(subject, &function->handle, module, compiled.cubin->lowered_name.c_str());
    d.cuFuncGetAttribute(subject, &static_shared, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function->handle);
    function->static_shared = static_cast<size_t>(static_shared);
    if (d.cuFuncGetParamInfo.function != nullptr) {
      size_t offset = 0;
      d.cuFuncGetParamInfo(subject, function->handle, 0, &offset, &function->params_size);
    }
    relaxed.restore();
  } catch (...) {
    d.cuModuleUnload.function(module);
    throw;
  }
  function->dynamic_shared_limit = kDefaultShared - std::min(kDefaultShared, function->static_shared);
  return function;
}

Function& find_function(DeviceState& state, const Kernel& kernel, CUstream stream) {
  const std::string key = kernel.header + ("\n" + kernel.expression);
  const auto known = [&]() -> Function* {
    const std::shared_lock lock(state.functions_mutex);
    const auto at = state.functions.find(key);
    return at == state.functions.end() ? nullptr : at->second.get();
  };
  if (Function* function = known()) return *function;
  const std::lock_guard loading(state.loading);
  if (Function* function = known()) return *function;
  std::unique_ptr<Function> made = prepare(state, kernel, stream);
  const std::unique_lock lock(state.functions_mutex);
  return *state.functions.emplace(key, std::move(made)).first->second;
}

void allow_shared(DeviceState& state, Function& function, size_t bytes, const Subject& subject) {
  if (bytes <= function.dynamic_shared_limit.load(std::memory_order_relaxed)) return;
  const auto most = static_cast<size_t>(state.description.properties.max_shared_per_block);
  if (bytes + function.static_shared > most) {
    throw Error(
        "kvk: kernel " + std::string(subject.kernel) + " needs " + std::to_string(bytes + function.static_shared) +
        " bytes of shared memory a block, cuda:" + std::to_string(state.index) + " has " + std::to_string(most));
  }
  const std::lock_guard lock(state.limits);
  if (bytes <= function.dynamic_shared_limit.load(std::memory_order_relaxed)) return;
  driver().cuFuncSetAttribute(subject, function.handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                              static_cast<int>(bytes));
  function.dynamic_shared_limit.store(bytes, std::memory_order_relaxed);
}

}  // namespace

namespace {

// The card that an explanation is for, if it names one: properties alone.
DeviceState& device_or_thought(int index) {
  const explain::Notes* notes = explain::notes();
  if (notes == nullptr || !notes->card) return device_state(index);
  thread_local DeviceState thought;
  thought.description.properties = {notes->card->arch, notes->card->num_sms, notes->card->max_shared_per_block};
  return thought;
}

void explain_launch(explain::Notes& notes, const Kernel& kernel, Dim3 grid, Dim3 block, size_t shared_bytes) {
  std::ostringstream json;
  json << "{\"step\": \"launch\", \"kernel\": \"" << kernel.expression << "\", \"grid\": [" << grid.x << ", " << grid.y
       << ", " << grid.z << "], \"threads\": " << block.x * block.y * block.z << ", \"shared_bytes\": " << shared_bytes
       << "}";
  notes.steps.push_back(json.str());
}

}  // namespace

DriverLauncher::DriverLauncher(int device, void* stream)
    : device_(device_or_thought(device)), stream_(static_cast<CUstream>(stream)) {}

const DeviceProperties& DriverLauncher::properties() const { return device_.description.properties; }

void DriverLauncher::launch(const Kernel& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const void* params,
                            size_t params_size) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (explain::notes() != nullptr) return explain_launch(*explain::notes(), kernel, grid, block, shared_bytes);
  const Driver& d = driver();
  const Subject subject{device_.index, kernel.expression.c_str()};
  CurrentContext context(device_, subject);
  Function& function = find_function(device_, kernel, stream_);
  if (function.params_size != 0 && function.params_size != params_size) {
    throw Error("kvk: kernel " + kernel.expression + " takes " + std::to_string(function.params_size) +
                " bytes of parameters, the launch gives " + std::to_string(params_size));
  }
  allow_shared(device_, function, shared_bytes, subject);
  void* arguments[] = {const_cast<void*>(params)};
  d.cuLaunchKernel(subject, function.handle, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                   static_cast<unsigned>(shared_bytes), stream_, arguments, nullptr);
  if (check_mode() && !kvk::cuda::capturing(stream_, subject)) d.cuStreamSynchronize(subject, stream_);
  context.pop();
}

void DriverLauncher::read(void* host, const void* device, size_t bytes) {
  if (explain::notes() != nullptr) {  // what was not launched has found nothing
    std::memset(host, 0, bytes);
    return;
  }
  const Driver& d = driver();
  const Subject subject{device_.index};
  CurrentContext context(device_, subject);
  if (kvk::cuda::capturing(stream_, subject)) {
    throw Error(
        "kvk: KVK_CHECK=1 reads back from the card what it has found, which cannot be while a CUDA graph is being "
        "captured: run the op without the capture, or unset KVK_CHECK");
  }
  d.cuMemcpyDtoHAsync_v2(subject, host, reinterpret_cast<CUdeviceptr>(device), bytes, stream_);
  d.cuStreamSynchronize(subject, stream_);
  context.pop();
}

bool DriverLauncher::capturing() const {
  const Subject subject{device_.index};
  CurrentContext context(device_, subject);
  const bool is = kvk::cuda::capturing(stream_, subject);
  context.pop();
  return is;
}

void DriverLauncher::load(const Kernel& kernel) {
  CurrentContext context(device_, {device_.index, kernel.expression.c_str()});
  find_function(device_, kernel, stream_);
  context.pop();
}

std::vector<DeviceDescription> list_devices() {
  const Driver& d = driver();
  int count = 0;
  d.cuDeviceGetCount({}, &count);
  std::vector<DeviceDescription> all;
  for (int index = 0; index < count; ++index) {
    CUdevice device = 0;
    d.cuDeviceGet({index}, &device, index);
    all.push_back(describe(device, index));
  }
  return all;
}

}  // namespace kvk::cuda
