// NVRTC's discovery and errors, over the fake NVRTC; the key of a cubin; shipped cubins.
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <set>
#include <thread>
#include <vector>

#include "cases.h"
#include "cuda/nvrtc.h"

namespace test {
namespace {

using kvk::cuda::Compiled;
using kvk::cuda::get_cubin;
using kvk::cuda::Missing;
using kvk::cuda::Origin;

std::string compile_error(const std::string& arch, int number = 1) {
  return error_of([&] { get_cubin(kernel(number), arch); });
}

KVK_CASE(nvrtc_missing) {
  const TemporaryCache cache;
  setenv("KVK_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  kvk::cuda::set_nvrtc_candidates({"/nowhere/libnvrtc.so.13"});
  setenv("KVK_NVRTC", "/nowhere/else.so", 1);
  const std::string named = compile_error("sm_90a");
  check_has(named, "kvk: the NVRTC that KVK_NVRTC names does not serve:\n  /nowhere/else.so", "KVK_NVRTC");
  check_lacks(named, "libnvrtc.so.13", "KVK_NVRTC alone");
  // Later it is there.
  const FakeNvrtc nvrtc(library("kvk_fake_nvrtc"));
  check_equal(compile_error("sm_90a"), "no error", "found");
}

KVK_CASE(nvrtc_nowhere) {
  const TemporaryCache cache;
  setenv("KVK_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  unsetenv("KVK_NVRTC");
  for (const char* name : {"libnvrtc.so.15", "libnvrtc.so.14", "libnvrtc.so.13", "libnvrtc.so.12"}) {
    if (dlopen(name, RTLD_NOW | RTLD_LOCAL) == nullptr) continue;
    check_has(kvk::cuda::nvrtc().path, "libnvrtc.so.", "the loader's search path has one");
    return;
  }
  kvk::cuda::set_nvrtc_candidates({"/nowhere/libnvrtc.so.13"});
  const std::string error = compile_error("sm_90a");
  check_has(error, "kvk: no NVRTC 12.0 or later", "missing");
  check_has(error, "pip install nvidia-cuda-nvrtc", "missing");
  check_has(error, "/nowhere/libnvrtc.so.13", "missing");
  check_has(error, "libnvrtc.so.12", "missing");
}

KVK_CASE(nvrtc_candidates) {
  const TemporaryCache cache;
  setenv("KVK_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  unsetenv("KVK_NVRTC");
  kvk::cuda::set_nvrtc_candidates({"/nowhere/libnvrtc.so.13", library("kvk_fake_cuda"), library("kvk_fake_nvrtc")});
  const kvk::cuda::Nvrtc& n = kvk::cuda::nvrtc();
  check_equal(n.path, library("kvk_fake_nvrtc"), "the first that serves");
  check_equal(n.version(), "12.8", "version");
}

KVK_CASE(nvrtc_too_old) {
  const TemporaryCache cache;
  setenv("KVK_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  setenv("FAKE_NVRTC_VERSION", "11.8", 1);
  const FakeNvrtc nvrtc(library("kvk_fake_nvrtc"));
  check_has(compile_error("sm_80"), "is version 11.8, kvk needs 12.0 or later", "11.8");
}

KVK_CASE(nvrtc_newer_than_driver) {
  setenv("FAKE_NVRTC_VERSION", "13.0", 1);
  const Fakes fakes;
  check_has(compile_error("sm_80"), "is version 13.0, and the driver supports only CUDA 12.8", "13.0");
  setenv("FAKE_NVRTC_VERSION", "12.9", 1);
  check_equal(compile_error("sm_80"), "no error", "a later minor version");
}

KVK_CASE(nvrtc_archs) {
  setenv("FAKE_NVRTC_VERSION", "12.4", 1);
  const Fakes fakes;
  for (const char* arch : {"sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"}) {
    check_equal(compile_error(arch), "no error", arch);
  }
  for (const char* arch : {"sm_100a", "sm_120a"}) {
    check_equal(
        compile_error(arch),
        "kvk: NVRTC 12.4 (" + library("kvk_fake_nvrtc") + ") cannot compile for " + arch +
            ", it knows sm_75, sm_80, sm_86, sm_89, sm_90. sm_100a and sm_120a need NVRTC 12.8 or later; kernel "
            "kvk::device::probe<1>",
        arch);
  }
  for (const char* arch :
       {"sm_75", "sm_9", "90a", "sm_90b", "sm_90ab", "compute_80", "sm_80 ", "", "sm_-80", "sm_+80"}) {
    check_has(compile_error(arch), "want sm_80 or later, such as sm_80, sm_90a", arch);
  }
  check_equal(kvk::cuda::arch_name(80), "sm_80", "arch_name");
  check_equal(kvk::cuda::arch_name(89), "sm_89", "arch_name");
  check_equal(kvk::cuda::arch_name(90), "sm_90a", "arch_name");
  check_equal(kvk::cuda::arch_name(100), "sm_100a", "arch_name");
  check_equal(kvk::cuda::arch_name(120), "sm_120a", "arch_name");
}

KVK_CASE(nvrtc_failures) {
  const Fakes fakes;
  for (const char* call : {"nvrtcVersion", "nvrtcGetNumSupportedArchs", "nvrtcGetSupportedArchs"}) {
    fakes.nvrtc.fail(call, 9);
    check_has(compile_error("sm_90a"), std::string("kvk: ") + call + " failed with NVRTC_ERROR_FAKE (9)", call);
    fakes.nvrtc.fail(call, 0);
  }
  for (const char* call :
       {"nvrtcCreateProgram", "nvrtcAddNameExpression", "nvrtcCompileProgram", "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog", "nvrtcGetLoweredName", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"}) {
    fakes.nvrtc.fail(call, 9);
    check_has(compile_error("sm_90a"),
              std::string("kvk: ") + call + " failed with NVRTC_ERROR_FAKE (9), kernel kvk::device::probe<1>", call);
    fakes.nvrtc.fail(call, 0);
  }
  fakes.nvrtc.fail("nvrtcCompileProgram", 6);
  check_equal(compile_error("sm_90a"),
              "kvk: NVRTC 12.8 does not compile kvk::device::probe<1> for sm_90a:\nline one of the log\n", "bad code");
  fakes.nvrtc.fail("nvrtcCompileProgram", 7);
  check_has(compile_error("sm_90a"), "Is libnvrtc-builtins beside the libnvrtc in use?", "builtins");
  fakes.nvrtc.fail("nvrtcCompileProgram", 0);
  check_equal(fakes.cache.count(".cubin"), 0, "nothing is stored of what failed");
  check_equal(error_of([] { get_cubin({"kvk/device/none.cuh", "kvk::none"}, "sm_90a"); }),
              "kvk: there is no device source kvk/device/none.cuh; kernel kvk::none", "header");
}

KVK_CASE(origins) {
  const Fakes fakes;
  const Compiled none = get_cubin(kernel(1), "sm_90a", Missing::leave);
  check(none.cubin == nullptr, "not compiled unless asked");
  const Compiled first = get_cubin(kernel(1), "sm_90a");
  check(first.origin == Origin::compiled, "compiled");
  check_has(first.cubin->image, "#include \"kvk/device/probe.cuh\"\nwith kvk/device/probe.cuh\n", "program");
  check_has(first.cubin->image,
            "\n--gpu-architecture=sm_90a\n--std=c++20\n--device-as-default-execution-space\n--ptxas-options=-v\n",
            "options");
  check_equal(first.cubin->lowered_name, "lowered(kvk::device::probe<1>)", "lowered name");
  const Compiled again = get_cubin(kernel(1), "sm_90a", Missing::leave);
  check(again.origin == Origin::memory && again.cubin == first.cubin, "memory");
  check_equal(fakes.nvrtc.compiles(), 1, "compiles");
  check_equal(fakes.cache.count(".cubin"), 1, "stored");
  check_equal(fakes.cache.count(".tmp"), 0, "temporary files");
  const auto stored = kvk::cuda::load_cubin(fakes.cache.path(), first.key);
  check(stored && stored->image == first.cubin->image && stored->log == first.cubin->log &&
            stored->lowered_name == first.cubin->lowered_name,
        "what is stored");
}

// Everything that can change the code changes the key.
KVK_CASE(keys) {
  const Fakes fakes;
  const TemporaryFolder sources;
  std::filesystem::create_directories(sources.file("kvk/device/deep"));
  std::set<std::string> keys;
  int wanted = 0;
  const auto next = [&](const kvk::cuda::Kernel& which, const std::string& arch, const char* what) {
    keys.insert(get_cubin(which, arch).key);
    check_equal(static_cast<int>(keys.size()), ++wanted, what);
  };
  const auto write = [&](const std::string& name, const std::string& text) {
    std::ofstream(sources.file("kvk/device/" + name)) << text;
  };
  next(kernel(1), "sm_90a", "a kernel");
  next(kernel(2), "sm_90a", "expression");
  next(kernel(1), "sm_80", "architecture");
  next(kernel(1), "sm_90", "architecture without a");
  setenv("KVK_NVRTC_FLAGS", "-lineinfo", 1);
  next(kernel(1), "sm_90a", "flags");
  setenv("KVK_NVRTC_FLAGS", " -lineinfo   -DX=1", 1);
  next(kernel(1), "sm_90a", "more flags");
  unsetenv("KVK_NVRTC_FLAGS");
  setenv("KVK_DEVICE_SOURCES", sources.path().c_str(), 1);
  write("probe.cuh", "// other");
  next(kernel(1), "sm_90a", "other sources");
  write("deep/more.h", "x");
  next(kernel(1), "sm_90a", "one more file");
  write("deep/more.h", "y");
  next(kernel(1), "sm_90a", "its text");
  write("notes.txt", "no source");
  check_equal(get_cubin(kernel(1), "sm_90a").origin == Origin::memory, true, "a file that is no source");
  write("same.cuh", "// other");
  next(kernel(1), "sm_90a", "another file");
  next({"kvk/device/same.cuh", "kvk::device::probe<1>"}, "sm_90a", "header");
  setenv("KVK_DEVICE_SOURCES", "/nowhere", 1);
  check_has(compile_error("sm_90a"), "KVK_DEVICE_SOURCES must name a folder with kvk/device in it", "no such folder");
}

KVK_CASE(keys_of_two_compilers) {
  const Fakes fakes;  // a process knows one NVRTC; the fake, loaded once more, is another
  const std::string here = kvk::cuda::nvrtc().build();
  check_has(here, "NVRTC 12.8, ", "build");
  kvk::cuda::Nvrtc other = kvk::cuda::nvrtc();
  other.minor = 9;
  check(other.build() != here, "version");
  other = kvk::cuda::nvrtc();
  other.file_size += 1;
  check(other.build() != here, "build of the same version");
}

KVK_CASE(shipped) {
  const Fakes fakes;
  const TemporaryFolder shipped;
  kvk::cuda::set_shipped_cubins(shipped.path());
  const Compiled made = kvk::cuda::ship_cubin(kernel(1), "sm_90a", shipped.path());
  check_equal(shipped.count(".cubin"), 1, "shipped");
  check_equal(fakes.cache.count(".cubin"), 0, "the cache is left alone");
  const Compiled found = get_cubin(kernel(1), "sm_90a", Missing::leave);
  check(found.origin == Origin::shipped && found.key == made.key, "found");
  check(get_cubin(kernel(1), "sm_80", Missing::leave).cubin == nullptr, "of that architecture alone");
  check_has(error_of([&] { kvk::cuda::ship_cubin(kernel(1), "sm_80", "/proc/nowhere"); }),
            "kvk: cannot write cubins to /proc/nowhere", "a folder that cannot be");
}

KVK_CASE(shipped_without_nvrtc) {
  const TemporaryFolder shipped;
  const kvk::cuda::Kernel which = kernel(1);
  std::string key;
  {
    // The key of a shipped cubin does not depend on the NVRTC that made it, so this process can learn it.
    const Fakes fakes;
    const int child = fork();
    if (child == 0) {
      kvk::cuda::ship_cubin(which, "sm_90a", shipped.path());
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check_equal(status, 0, "child");
  }
  setenv("KVK_NVRTC", "/nowhere", 1);
  setenv("KVK_LIBCUDA", "/nowhere", 1);
  setenv("KVK_CACHE", "off", 1);
  check_has(compile_error("sm_90a"), "does not serve", "before");
  kvk::cuda::set_shipped_cubins(shipped.path());
  check(get_cubin(which, "sm_90a").origin == Origin::shipped, "a shipped cubin needs no NVRTC");
  check_has(compile_error("sm_90a", 2), "does not serve", "another kernel");
}

KVK_CASE(log_lines) {
  const Fakes fakes;
  check_equal(stderr_of([] { get_cubin(kernel(1), "sm_90a"); }), "", "quiet");
  setenv("KVK_LOG", "0", 1);
  check_equal(stderr_of([] { get_cubin(kernel(2), "sm_90a"); }), "", "KVK_LOG=0");
  setenv("KVK_LOG", "1", 1);
  const std::string compiled = stderr_of([] { get_cubin(kernel(3), "sm_90a"); });
  check_has(compiled, "kvk: compiled: kvk::device::probe<3> for sm_90a in ", "compiled");
  check_has(compiled, " 40 registers", "registers");
  check_has(stderr_of([] { get_cubin(kernel(1), "sm_90a"); }), "kvk: memory: kvk::device::probe<1>", "memory");
  setenv("KVK_CACHE", "/proc/nowhere", 1);
  const std::string unwritable = stderr_of([] { get_cubin(kernel(4), "sm_90a"); });
  check_has(unwritable, "kvk: the cache /proc/nowhere does not take the cubin: cannot make the folder: ", "unwritable");
  check_has(unwritable, "kvk: compiled: kvk::device::probe<4>", "goes on");
}

KVK_CASE(resources) {
  const auto none = kvk::cuda::resources("");
  check_equal(none.registers, -1, "nothing said");
  check_equal(none.stack_bytes, -1, "nothing said");
  const auto both = kvk::cuda::resources(
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Function properties for _Z5innerv\n"
      "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
      "ptxas info    : Compiling entry function '_Z1k' for 'sm_80'\n"
      "ptxas info    : Function properties for _Z1k\n"
      "ptxas         .     256 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 1 barriers, 256 bytes cumulative stack size, 4352 bytes smem, 368 bytes "
      "cmem[0]\n");
  check_equal(both.registers, 168, "registers");
  check_equal(both.stack_bytes, 272, "stack");
  check_equal(both.spill_store_bytes, 16, "spill stores");
  check_equal(both.spill_load_bytes, 32, "spill loads");
  check_equal(both.shared_bytes, 4352, "shared");
  check_equal(kvk::cuda::resources("ptxas info    : Used 20 registers, 368 bytes cmem[0]\n").shared_bytes, 0,
              "no shared");
}

KVK_CASE(compile_threads) {
  const Fakes fakes;
  std::vector<std::thread> threads;
  std::vector<std::string> keys(8);
  for (size_t t = 0; t < keys.size(); ++t) {
    threads.emplace_back([&keys, t] { keys[t] = get_cubin(kernel(static_cast<int>(t % 2)), "sm_90a").key; });
  }
  for (std::thread& thread : threads) thread.join();
  check(keys[0] == keys[2] && keys[1] == keys[3] && keys[0] != keys[1], "keys");
  check_equal(fakes.cache.count(".cubin"), 2, "stored");
}

}  // namespace
}  // namespace test
