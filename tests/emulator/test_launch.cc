// Kernels launched by the name that the launch code gives NVRTC, through the launch code's own interface.
#include "emulator/harness.h"
#include "emulator/kernels/toy_hadamard.cuh"
#include "emulator/launcher.h"

KVK_EMULATED_KERNEL(kvk::device::toy_hadamard_kernel<kvk::device::bf16>);
KVK_EMULATED_KERNEL(kvk::device::toy_hadamard_kernel<kvk::device::f16>);

namespace kvk::emu {
namespace {

constexpr const char* kName = "kvk::device::toy_hadamard_kernel< kvk::device::f16 >";  // blanks do not count

void test_launch() {
  EmulatorLauncher emulated(7);
  cuda::Launcher& launcher = emulated;
  expect(launcher.properties().arch == 90 && launcher.properties().num_sms == 7, "properties");
  expect(launcher.properties().max_shared_per_block == 227 * 1024, "shared memory of sm_90");
  expect(known_kernels().size() == 2, "known kernels");

  const std::vector<device::f16> ones(128, {0x3c00});  // 1.0
  const DeviceArray<device::f16> in(ones), out(128);
  const device::ToyHadamardParams params = {reinterpret_cast<device::bf16*>(in.data()),
                                            reinterpret_cast<device::bf16*>(out.data()), 1, 0.5f, 0};
  launcher.launch({"", kName}, {1}, {128}, 0, &params, sizeof params);
  bool right = true;
  for (int i = 0; i < 128; ++i) right &= f16_value(out.host()[i].bits) == (i == 0 ? 64.0f : 0.0f);
  expect(right, "the transform of ones");

  expect_error("launch", "parameters of another size",
               [&] { launcher.launch({"", kName}, {1}, {128}, 0, &params, 8); });
  expect_error("unknown-kernel", "a kernel that is not registered", [&] {
    launcher.launch({"", "kvk::device::toy_hadamard_kernel<float>"}, {1}, {128}, 0, &params, sizeof params);
  });
  expect_error("nothing", "a grid of no blocks does nothing",
               [&] { launcher.launch({"", kName}, {0}, {128}, 0, &params, sizeof params); });
  expect_error("launch", "a block of no threads",
               [&] { launcher.launch({"", kName}, {1}, {0}, 0, &params, sizeof params); });
}

}  // namespace
}  // namespace kvk::emu

int main() { return kvk::emu::run_tests(kvk::emu::test_launch); }
