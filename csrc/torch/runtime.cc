// torch.ops.kvk._*: what Python asks of the CUDA runtime (kvk/cuda.py): what was found, compiling ahead, loading ahead.
#include <sstream>
#include <string>
#include <vector>

#include "core/explain.h"
#include "core/json.h"
#include "cuda/compiler.h"
#include "cuda/driver.h"
#include "cuda/driver_launcher.h"
#include "cuda/launch.h"
#include "cuda/nvrtc.h"
#include "cuda/sources.h"
#include "torch/adapter.h"
#include "torch/cuda_stream.h"

namespace kvk::torch_face {
namespace {

std::string driver_json() {
  std::ostringstream json;
  try {
    const cuda::Driver& driver = cuda::driver();
    json << "{\"cuda\": " << json_quoted(cuda::version_text(driver.version)) << ", \"devices\": [";
    const char* separator = "";
    for (const cuda::DeviceDescription& device : cuda::list_devices()) {
      const int arch = device.properties.arch;
      json << separator << "{\"name\": " << json_quoted(device.name) << ", \"capability\": \"" << arch / 10 << '.'
           << arch % 10 << "\", \"arch\": " << (arch >= 80 ? json_quoted(cuda::arch_name(arch)) : "null")
           << ", \"num_sms\": " << device.properties.num_sms
           << ", \"max_shared_per_block\": " << device.properties.max_shared_per_block << "}";
      separator = ", ";
    }
    json << "]}";
  } catch (const Error& error) {
    return "{\"error\": " + json_quoted(error.what()) + "}";
  }
  return json.str();
}

std::string nvrtc_json() {
  try {
    const cuda::Nvrtc& nvrtc = cuda::nvrtc();
    return "{\"version\": " + json_quoted(nvrtc.version()) + ", \"path\": " + json_quoted(nvrtc.path) + "}";
  } catch (const Error& error) {
    return "{\"error\": " + json_quoted(error.what()) + "}";
  }
}

// JSON; kvk.cuda.info() describes it.
std::string runtime_info() {
  return "{\"driver\": " + driver_json() + ", \"nvrtc\": " + nvrtc_json() +
         ", \"torch_cuda\": " + (find_current_cuda_stream() != nullptr ? "true" : "false") +
         ", \"cache\": " + json_quoted(cuda::cache_folder()) +
         ", \"device_sources\": " + json_quoted(cuda::device_sources()->digest) + "}";
}

void set_nvrtc_candidates(std::vector<std::string> paths) { cuda::set_nvrtc_candidates(std::move(paths)); }

void set_shipped_cubins(std::string folder) { cuda::set_shipped_cubins(folder); }

// Into the cache; or, if `folder` is not empty, into that folder, as cubins to ship. JSON; kvk.cuda.compile_kernel
// describes it.
std::string compile_kernel(std::string header, std::string expression, std::string arch, std::string folder) {
  const cuda::Kernel kernel{header.c_str(), expression};
  const cuda::Compiled compiled =
      folder.empty() ? cuda::get_cubin(kernel, arch) : cuda::ship_cubin(kernel, arch, folder);
  const cuda::Resources used = cuda::resources(compiled.cubin->log);
  std::ostringstream json;
  json << "{\"origin\": " << json_quoted(cuda::origin_name(compiled.origin))
       << ", \"key\": " << json_quoted(compiled.key) << ", \"seconds\": " << compiled.seconds
       << ", \"cubin_bytes\": " << compiled.cubin->image.size()
       << ", \"lowered_name\": " << json_quoted(compiled.cubin->lowered_name) << ", \"registers\": " << used.registers
       << ", \"stack_bytes\": " << used.stack_bytes << ", \"spill_store_bytes\": " << used.spill_store_bytes
       << ", \"spill_load_bytes\": " << used.spill_load_bytes << ", \"shared_bytes\": " << used.shared_bytes
       << ", \"log\": " << json_quoted(compiled.cubin->log) << "}";
  return json.str();
}

std::string default_kernels() {
  std::ostringstream json;
  const char* separator = "[";
  for (const cuda::Kernel& kernel : cuda::default_kernels()) {
    json << separator << "{\"header\": " << json_quoted(kernel.header)
         << ", \"expression\": " << json_quoted(kernel.expression) << "}";
    separator = ", ";
  }
  return json.str() + "]";
}

// Compiles if need be and loads onto the card, so that a CUDA graph can capture the kernel's first launch.
void load_kernel(std::string header, std::string expression, int64_t device) {
  const int index = static_cast<int>(device);
  cuda::DriverLauncher(index, current_cuda_stream(index)).load({header.c_str(), expression});
}

// Between begin and end this thread's calls are explained (core/explain.h). arch 0: the card or CPU of the tensors.
void explain_begin(int64_t arch, int64_t num_sms, int64_t max_shared_per_block) {
  thread_local explain::Notes notes;
  notes = {};
  if (arch != 0) {
    notes.card =
        explain::Card{static_cast<int>(arch), static_cast<int>(num_sms), static_cast<int>(max_shared_per_block)};
  }
  explain::current = &notes;
}

// JSON: the list of steps.
std::string explain_end() {
  if (explain::current == nullptr) return "[]";
  std::ostringstream json;
  const char* separator = "[";
  for (const std::string& step : explain::current->steps) {
    json << separator << step;
    separator = ", ";
  }
  if (explain::current->steps.empty()) json << "[";
  explain::current = nullptr;
  return json.str() + "]";
}

}  // namespace

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("_runtime_info() -> str");
  m.def("_set_nvrtc_candidates(str[] paths) -> ()");
  m.def("_set_shipped_cubins(str folder) -> ()");
  m.def("_compile_kernel(str header, str expression, str arch, str folder) -> str");
  m.def("_default_kernels() -> str");
  m.def("_explain_begin(int arch, int num_sms, int max_shared_per_block) -> ()");
  m.def("_explain_end() -> str");
  m.def("_load_kernel(str header, str expression, int device) -> ()");
}

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_runtime_info", TORCH_BOX(&runtime_info));
  m.impl("_set_nvrtc_candidates", TORCH_BOX(&set_nvrtc_candidates));
  m.impl("_set_shipped_cubins", TORCH_BOX(&set_shipped_cubins));
  m.impl("_compile_kernel", TORCH_BOX(&compile_kernel));
  m.impl("_default_kernels", TORCH_BOX(&default_kernels));
  m.impl("_explain_begin", TORCH_BOX(&explain_begin));
  m.impl("_explain_end", TORCH_BOX(&explain_end));
  m.impl("_load_kernel", TORCH_BOX(&load_kernel));
}

}  // namespace kvk::torch_face
