// The driver and the launcher, over the fake driver.
#include <atomic>
#include <thread>
#include <vector>

#include "cases.h"
#include "cuda/driver.h"

namespace test {
namespace {

using kvk::cuda::DriverLauncher;

void* const kStream = reinterpret_cast<void*>(0x5);

std::string launch_error(DriverLauncher& launcher, const kvk::cuda::Kernel& which, size_t shared = 0,
                         const std::string& params = "8 bytes.") {
  return error_of([&] { launcher.launch(which, {1, 2, 3}, {32, 4, 1}, shared, params.data(), params.size()); });
}

KVK_CASE(driver_missing) {
  setenv("KVK_LIBCUDA", "/nowhere/libcuda.so.1", 1);
  const std::string error = error_of([] { DriverLauncher(0, nullptr); });
  check_has(error, "kvk: no CUDA driver", "launcher");
  check_has(error, "/nowhere/libcuda.so.1", "launcher");
  check_has(error, "525 or later", "launcher");
  check_has(error_of([] { kvk::cuda::list_devices(); }), "no CUDA driver", "list_devices");
  check(kvk::cuda::driver_if_present() == nullptr, "no driver");
}

KVK_CASE(driver_incomplete) {
  const FakeCuda cuda(library("kvk_fake_cuda_incomplete"));
  check_has(error_of([] { kvk::cuda::driver(); }), "has no cuStreamIsCapturing", "driver");
}

KVK_CASE(driver_too_old) {
  const FakeCuda cuda(library("kvk_fake_cuda"));
  cuda.set("version", 11040);
  check_equal(error_of([] { kvk::cuda::driver(); }),
              "kvk: the CUDA driver is too old: it supports CUDA 11.4, kvk needs 12.0 or later (driver 525)", "driver");
  cuda.set("version", 12000);
  check_equal(kvk::cuda::driver().version, 12000, "a driver that serves, after one that did not");
}

KVK_CASE(devices) {
  const Fakes fakes;
  const auto all = kvk::cuda::list_devices();
  check_equal(static_cast<int>(all.size()), 2, "cards");
  check_equal(all[1].name, "Fake 1", "name");
  check_equal(all[1].properties.arch, 90, "arch");
  check_equal(all[1].properties.num_sms, 132, "num_sms");
  check_equal(all[1].properties.max_shared_per_block, 232448, "max_shared_per_block");
  check_lacks(fakes.cuda.calls(), "cuDevicePrimaryCtxRetain", "list_devices makes no context");
  for (const int bad : {-1, 2, 64, 1000}) {
    check_equal(error_of([&] { DriverLauncher(bad, nullptr); }),
                "kvk: there is no device cuda:" + std::to_string(bad) + ", the driver sees 2 cards", "device");
  }
  fakes.cuda.set("devices", 0);
  check(kvk::cuda::list_devices().empty(), "no card");
  check_has(error_of([] { DriverLauncher(0, nullptr); }), "the driver sees 0 cards", "no card");
  fakes.cuda.set("devices", 1);
  fakes.cuda.set("capability", 75);
  check_equal(error_of([] { DriverLauncher(0, nullptr); }),
              "kvk: the card has compute capability 7.5, kvk's CUDA kernels need 8.0 or later; cuda:0 is Fake 0",
              "Turing");
}

KVK_CASE(launch) {
  const Fakes fakes;
  DriverLauncher launcher(1, kStream);
  check_equal(launcher.properties().arch, 90, "properties");
  fakes.cuda.calls();

  check_equal(launch_error(launcher, kernel(1)), "no error", "first launch");
  std::string calls = fakes.cuda.calls();
  check_has(calls,
            "cuLaunchKernel lowered(kvk::device::probe<1>) device=1 grid=1,2,3 block=32,4,1 shared=0 stream=0x5\n",
            "launch");
  check_has(calls, "cuModuleGetFunction lowered(kvk::device::probe<1>)", "function");
  check_lacks(calls, "cuFuncSetAttribute", "little shared memory");
  check_lacks(calls, "cuStreamSynchronize", "no synchronisation");
  check_equal(fakes.cuda.params(), "8 bytes.", "parameters");
  check_equal(fakes.cuda.context_depth(), 0, "the caller's context is left as it was");
  check_equal(fakes.cuda.capture_mode(), 0, "the caller's capture mode is left as it was");

  check_equal(launch_error(launcher, kernel(1), 0, "another!"), "no error", "second launch");
  calls = fakes.cuda.calls();
  check_equal(calls,
              "cuCtxPushCurrent_v2 device=1\n"
              "cuLaunchKernel lowered(kvk::device::probe<1>) device=1 grid=1,2,3 block=32,4,1 shared=0 stream=0x5\n"
              "cuCtxPopCurrent_v2\n",
              "all that a later launch does");
  check_equal(fakes.cuda.params(), "another!", "parameters");
  check_equal(fakes.nvrtc.compiles(), 1, "compiled once");

  // The same kernel on the other card: loaded there, not compiled again.
  DriverLauncher other(0, nullptr);
  check_equal(launch_error(other, kernel(1)), "no error", "other card");
  check_has(fakes.cuda.calls(), "device=0 grid=1,2,3 block=32,4,1 shared=0 stream=(nil)", "other card");
  check_equal(fakes.nvrtc.compiles(), 1, "compiled once for both cards");
  check_equal(fakes.cuda.modules(), 2, "a module on each card");

  launcher.launch(kernel(2), {0, 1, 1}, {32, 1, 1}, 0, "8 bytes.", 8);
  check_equal(fakes.cuda.calls(), "", "a grid without blocks");

  check_equal(launch_error(launcher, kernel(1), 0, "not eight bytes"),
              "kvk: kernel kvk::device::probe<1> takes 8 bytes of parameters, the launch gives 15", "parameter size");
  check_equal(fakes.cuda.context_depth(), 0, "context after an error");
}

KVK_CASE(shared_memory) {
  const Fakes fakes;
  fakes.cuda.set("static_shared", 1024);
  DriverLauncher launcher(0, kStream);
  check_equal(launch_error(launcher, kernel(1), 47 * 1024), "no error", "47 KiB and 1 KiB static");
  check_lacks(fakes.cuda.calls(), "cuFuncSetAttribute", "47 KiB and 1 KiB static");
  check_equal(launch_error(launcher, kernel(1), 47 * 1024 + 16), "no error", "above");
  check_has(fakes.cuda.calls(), "cuFuncSetAttribute 8=48144\n", "above");
  check_equal(launch_error(launcher, kernel(1), 47 * 1024 + 16), "no error", "the same again");
  check_equal(launch_error(launcher, kernel(1), 100), "no error", "less");
  check_lacks(fakes.cuda.calls(), "cuFuncSetAttribute", "allowed already");
  check_equal(launch_error(launcher, kernel(1), 231424), "no error", "all there is");
  check_has(fakes.cuda.calls(), "cuFuncSetAttribute 8=231424\n", "all there is");
  check_equal(launch_error(launcher, kernel(1), 231425),
              "kvk: kernel kvk::device::probe<1> needs 232449 bytes of shared memory a block, cuda:0 has 232448",
              "too much");
}

KVK_CASE(driver_failures) {
  const Fakes fakes;
  // Until the card is open: the call and the card are named; the next attempt starts again.
  for (const char* call : {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName",
                           "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"}) {
    fakes.cuda.fail(call, 999);
    const std::string error = error_of([] { DriverLauncher(1, nullptr); });
    check_has(error, std::string("kvk: ") + call + " failed with FAKE_ERROR_999 (999: as the test wants it)", call);
    if (std::string(call).find("cuDevice") == 0) check_has(error, "device cuda:1", call);
    fakes.cuda.fail(call, 0);
  }
  DriverLauncher launcher(1, kStream);
  // From then on the kernel, too.
  int number = 0;
  for (const char* call :
       {"cuCtxPushCurrent_v2", "cuStreamIsCapturing", "cuThreadExchangeStreamCaptureMode", "cuModuleLoadDataEx",
        "cuModuleGetFunction", "cuFuncGetAttribute", "cuFuncGetParamInfo", "cuFuncSetAttribute", "cuLaunchKernel"}) {
    const kvk::cuda::Kernel which = kernel(++number);
    fakes.cuda.fail(call, 1);
    check_equal(launch_error(launcher, which, 100000),
                std::string("kvk: ") + call + " failed with FAKE_ERROR_1 (1: as the test wants it), kernel " +
                    which.expression + ", device cuda:1",
                call);
    check_equal(fakes.cuda.context_depth(), 0, std::string(call) + ": context");
    check_equal(fakes.cuda.capture_mode(), 0, std::string(call) + ": capture mode");
    fakes.cuda.fail(call, 0);
    check_equal(launch_error(launcher, which, 100000), "no error", std::string("after ") + call);
    check_equal(fakes.cuda.modules(), number, std::string(call) + ": no module is left from the failure");
  }
  fakes.cuda.fail("cuCtxPopCurrent_v2", 1);
  check_has(launch_error(launcher, kernel(1)), "kvk: cuCtxPopCurrent_v2 failed", "pop");
  fakes.cuda.fail("cuCtxPopCurrent_v2", 0);

  for (const int code : {214, 700, 702, 710, 714, 715, 716, 717, 718, 719}) {
    fakes.cuda.fail("cuLaunchKernel", code);
    check_has(launch_error(launcher, kernel(1)), "A kernel that ran before", "error " + std::to_string(code));
  }
  fakes.cuda.fail("cuLaunchKernel", 0);
  for (const int code : {200, 209}) {
    fakes.cuda.fail("cuModuleLoadDataEx", code);
    check_has(launch_error(launcher, kernel(100)), "The driver, of CUDA 12.8, does not take the code (", "load");
  }
}

KVK_CASE(check_mode) {
  setenv("KVK_CHECK", "1", 1);
  const Fakes fakes;
  DriverLauncher launcher(0, kStream);
  check_equal(launch_error(launcher, kernel(1)), "no error", "launch");
  check_has(fakes.cuda.calls(), "cuStreamSynchronize", "waits");
  fakes.cuda.fail("cuStreamSynchronize", 700);
  check_has(launch_error(launcher, kernel(1)), "kvk: cuStreamSynchronize failed with FAKE_ERROR_700", "kernel's error");
  fakes.cuda.set("capture", 1);
  check_equal(launch_error(launcher, kernel(1)), "no error", "a captured launch is not waited for");
}

KVK_CASE(read) {
  const Fakes fakes;
  DriverLauncher launcher(1, kStream);
  fakes.cuda.calls();
  const std::string on_card = "what the kernel found";
  std::string found(on_card.size(), ' ');
  const auto read = [&] { return error_of([&] { launcher.read(found.data(), on_card.data(), on_card.size()); }); };
  check_equal(read(), "no error", "read");
  check_equal(found, on_card, "what was read");
  check_equal(fakes.cuda.calls(),
              "cuCtxPushCurrent_v2 device=1\n"
              "cuStreamIsCapturing\n"
              "cuMemcpyDtoHAsync_v2 21\n"
              "cuStreamSynchronize\n"
              "cuCtxPopCurrent_v2\n",
              "a copy is waited for");
  for (const char* call : {"cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"}) {
    fakes.cuda.fail(call, 1);
    check_equal(read(),
                std::string("kvk: ") + call + " failed with FAKE_ERROR_1 (1: as the test wants it), device cuda:1",
                call);
    check_equal(fakes.cuda.context_depth(), 0, std::string(call) + ": context");
    fakes.cuda.fail(call, 0);
  }
  fakes.cuda.set("capture", 1);
  fakes.cuda.calls();
  check_equal(
      read(),
      "kvk: KVK_CHECK=1 reads back from the card what it has found, which cannot be while a CUDA graph is being "
      "captured: run the op without the capture, or unset KVK_CHECK",
      "captured");
  check_lacks(fakes.cuda.calls(), "cuMemcpyDtoHAsync_v2", "captured");
  check_equal(fakes.cuda.context_depth(), 0, "context");
}

KVK_CASE(old_driver) {
  const TemporaryCache cache;
  const FakeCuda cuda(library("kvk_fake_cuda_old"));
  const FakeNvrtc nvrtc(library("kvk_fake_nvrtc"));
  DriverLauncher launcher(0, kStream);
  check_equal(launch_error(launcher, kernel(1)), "no error", "a driver without cuFuncGetParamInfo");
}

KVK_CASE(capture) {
  const Fakes fakes;
  DriverLauncher launcher(0, kStream);
  check_equal(launch_error(launcher, kernel(1)), "no error", "before");
  fakes.cuda.set("capture", 1);
  check_equal(launch_error(launcher, kernel(1)), "no error", "a kernel that has run");

  const std::string refusal =
      "kvk: kvk::device::probe<2> is not compiled for cuda:0 (sm_90a) yet, and nothing is compiled while a CUDA graph is "
      "being captured. Run the op once before the capture, or call kvk.precompile() first (python -m kvk precompile "
      "--arch sm_90a)";
  check_equal(launch_error(launcher, kernel(2)), refusal, "a kernel that has not");
  fakes.cuda.set("capture", 0);
  fakes.cuda.fail("cuStreamIsCapturing", 906);
  check_equal(launch_error(launcher, kernel(2)), refusal, "the default stream while another is captured");
  fakes.cuda.fail("cuStreamIsCapturing", 0);
  check_equal(fakes.nvrtc.compiles(), 1, "nothing was compiled");

  // Compiled ahead: loaded during the capture, which stays valid.
  kvk::cuda::get_cubin(kernel(2), "sm_90a");
  fakes.cuda.set("capture", 1);
  check_equal(launch_error(launcher, kernel(2)), "no error", "a kernel of the cache");
  check_equal(fakes.cuda.capture_mode(), 0, "the thread's capture mode");
  // A driver that refuses, as those before 12.3 do.
  kvk::cuda::get_cubin(kernel(3), "sm_90a");
  fakes.cuda.fail("cuModuleLoadDataEx", 900);
  check_has(launch_error(launcher, kernel(3)), "run the op once before the capture",
            "a driver that does not load then");
  check_has(launch_error(launcher, kernel(3)), "kernel kvk::device::probe<3>", "a driver that does not load then");
  check_equal(fakes.cuda.capture_mode(), 0, "the thread's capture mode");
  check_equal(fakes.cuda.context_depth(), 0, "context");
}

KVK_CASE(load_ahead) {
  const Fakes fakes;
  DriverLauncher launcher(0, kStream);
  launcher.load(kernel(1));
  check_lacks(fakes.cuda.calls(), "cuLaunchKernel", "load");
  fakes.cuda.set("capture", 1);
  check_equal(launch_error(launcher, kernel(1)), "no error", "captured");
  check_has(fakes.cuda.calls(), "cuLaunchKernel", "captured");
}

KVK_CASE(launch_threads) {
  const Fakes fakes;
  constexpr int kThreads = 8, kKernels = 4;
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 3 * kKernels; ++i) {
        DriverLauncher launcher(t % 2, kStream);
        const size_t shared = static_cast<size_t>(40000 + 1000 * ((t + i) % 20));
        if (launch_error(launcher, kernel((t + i) % kKernels), shared) != "no error") ++failed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check_equal(failed.load(), 0, "launches that failed");
  check_equal(fakes.cuda.modules(), 2 * kKernels, "modules: one a kernel and card");
  check(fakes.nvrtc.compiles() >= kKernels && fakes.nvrtc.compiles() <= 2 * kKernels, "compiles: at most one a card");
}

}  // namespace
}  // namespace test
