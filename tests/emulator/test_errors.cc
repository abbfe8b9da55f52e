// Each wrong kernel must be refused with the right kind of error, and each right one accepted.
#include "emulator/fiber.h"
#include "emulator/harness.h"
#include "kvk/device/ptx.h"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

namespace kvk::device {
namespace {

using emu::DeviceArray;
using emu::expect_error;

struct Params {
  float* out = nullptr;
  const float* in = nullptr;
  int n = 0;
};

void run(void (*kernel)(Params), unsigned threads, Params p, size_t smem = 1024, unsigned blocks = 1) {
  static void (*chosen)(Params);
  chosen = kernel;
  const emu::Kernel k = {"test", [](const void* params) { chosen(*static_cast<const Params*>(params)); }, sizeof p};
  emu::launch(k, {{blocks}, {threads}, smem}, &p);
}

#define KERNEL(name) static void name([[maybe_unused]] const Params p)

// ---------------------------------------------------------------------------------------------- barriers, collectives
KERNEL(exits_before_barrier) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
KERNEL(two_barriers_in_two_branches) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
KERNEL(half_a_warp_shuffles) {
  if (threadIdx.x < 16) {
    __shfl_sync(0xffffffffu, 1, 0);
  } else {
    __syncwarp();
  }
}
KERNEL(reads_an_exited_lane) {
  if (threadIdx.x < 16) __shfl_sync(0xffffffffu, 1, 20);
}
KERNEL(not_in_its_own_mask) {
  if (threadIdx.x < 16) __shfl_sync(0xffff0000u, 1, 16);
}
KERNEL(shuffle_source_outside_mask) {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1, 16);
}
KERNEL(barrier_counts_differ) {
  if (threadIdx.x < 32) {
    ptx::bar_sync(1, 96);
  } else {
    ptx::bar_sync(1, 64);
  }
}
KERNEL(barrier_never_filled) {
  if (threadIdx.x < 32) ptx::bar_sync(1, 64);
}
KERNEL(mma_by_half_a_warp) {
  uint32_t a[4] = {};
  float d[4] = {};
  if (threadIdx.x < 16) ptx::mma_m16n8k16<bf16>(d, a, 0, 0);
}
KERNEL(arrive_and_sync) {
  KVK_SHARED(s, float[64]);
  s[threadIdx.x] = float(threadIdx.x);
  if (threadIdx.x < 32) {
    ptx::bar_arrive(1, 64);
    return;
  }
  ptx::bar_sync(1, 64);
  p.out[threadIdx.x] = s[threadIdx.x - 32];
}
KERNEL(traps) {
  if (threadIdx.x == 3) __trap();
}
KERNEL(mbarrier_never_initialised) {
  SmemCarver carve;
  uint64_t* bar = carve.take<uint64_t>(1);
  ptx::mbar_arrive(bar);
}

// ---------------------------------------------------------------------------------------------- memory
KERNEL(carves_too_much) {
  SmemCarver carve;
  carve.take<float>(400);
}
KERNEL(carves_differently) {
  SmemCarver carve;
  carve.take<float>(16 + threadIdx.x % 2);
}
KERNEL(misaligned_copy) {
  SmemCarver carve;
  char* s = carve.take<char>(64);
  ptx::cp_async<16>(s + 4, p.in);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
KERNEL(misaligned_load) { p.out[0] = __uint_as_float(load_words<4>(p.in + 1).w[0]); }
KERNEL(copy_never_waited_for) {
  SmemCarver carve;
  float* s = carve.take<float>(128);
  ptx::cp_async<16>(s + threadIdx.x * 4, p.in);
  ptx::cp_async_commit();
}
KERNEL(vector_past_the_end) { store_words(p.out + threadIdx.x * 4 + p.n, Words<4>{}); }
KERNEL(copies_past_the_end) {
  SmemCarver carve;
  float* s = carve.take<float>(128);
  ptx::cp_async<16>(s + threadIdx.x * 4, p.in + threadIdx.x * 4 + p.n);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
KERNEL(writes_an_input) { store_words(const_cast<float*>(p.in) + threadIdx.x * 4, Words<4>{}); }
KERNEL(one_past_a_shared_array) {
  KVK_SHARED(s, float[32]);
  float* q = s;
  q[threadIdx.x + p.n] = 1.0f;
  __syncthreads();
}
KERNEL(one_past_a_buffer) { p.out[threadIdx.x + p.n] = 1.0f; }
KERNEL(reads_host_memory) { p.out[threadIdx.x] = p.in[threadIdx.x]; }
constexpr float kTable[4] = {1, 2, 3, 4};
KERNEL(reads_constants) { p.out[threadIdx.x] = kTable[threadIdx.x % 4] + float(p.n); }
KERNEL(reads_unwritten_shared) {
  KVK_SHARED(s, float[32]);
  if (threadIdx.x != 7) s[threadIdx.x] = 1.0f;
  __syncwarp();
  p.out[threadIdx.x] = s[threadIdx.x];
}

// ---------------------------------------------------------------------------------------------- shared-memory races
KERNEL(exchange_without_syncwarp) {
  KVK_SHARED(s, float[32]);
  s[threadIdx.x] = float(threadIdx.x);
  p.out[threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL(shuffle_is_no_fence) {
  KVK_SHARED(s, float[32]);
  s[threadIdx.x] = float(threadIdx.x);
  __shfl_sync(~0u, 0, 0);
  p.out[threadIdx.x] = s[threadIdx.x ^ 1];
}
KERNEL(arrives_on_the_wrong_side) {
  KVK_SHARED(s, float[64]);
  s[threadIdx.x] = float(threadIdx.x);
  if (threadIdx.x >= 32) {
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
  }
  if (threadIdx.x >= 32) p.out[threadIdx.x] = s[threadIdx.x - 32];
}
KERNEL(write_after_read) {
  KVK_SHARED(s, float[64]);
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  p.out[threadIdx.x] = s[63 - threadIdx.x];
  s[threadIdx.x] = 2.0f;
}
KERNEL(atomics) {
  KVK_SHARED(s, int);
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, 1);
  __syncthreads();
  p.out[threadIdx.x] = float(s);
}
KERNEL(atomic_and_plain) {
  KVK_SHARED(s, int);
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, 1);
  p.out[threadIdx.x] = float(s);
}
KERNEL(bytes_side_by_side) {
  KVK_SHARED(s, uint8_t[64]);
  s[threadIdx.x] = uint8_t(threadIdx.x);
  __syncthreads();
  p.out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// The wrong kernel is not wrong under every schedule: some schedule must show it.
void expect_error_under_some_schedule(const std::string& what, void (*kernel)(Params), unsigned threads, Params p) {
  emu::Options& o = emu::options();
  const emu::Options before = o;
  o.order = emu::Options::Order::random;
  std::string got;
  for (o.seed = 1; o.seed <= 8 && got.empty(); o.seed++) {
    try {
      run(kernel, threads, p);
    } catch (const emu::Error& e) {
      got = e.kind;
    }
  }
  o = before;
  emu::expect(got == "race" || got == "uninitialised-shared", what + ": " + got);
}

void test_all_builds() {
  const DeviceArray<float> out(64);
  const DeviceArray<float> in(std::vector<float>(64, 1.0f));
  const Params p = {out.data(), in.data(), 0};
  expect_error("exit-before-barrier", "a thread leaves before __syncthreads",
               [&] { run(exits_before_barrier, 64, p); });
  expect_error("divergence", "two __syncthreads in two branches", [&] { run(two_barriers_in_two_branches, 64, p); });
  expect_error("deadlock", "half a warp shuffles with the full mask", [&] { run(half_a_warp_shuffles, 32, p); });
  expect_error("divergence", "a shuffle reads an exited lane", [&] { run(reads_an_exited_lane, 32, p); });
  expect_error("divergence", "the caller is not in its own mask", [&] { run(not_in_its_own_mask, 32, p); });
  expect_error("divergence", "a shuffle's source is outside the mask",
               [&] { run(shuffle_source_outside_mask, 32, p); });
  expect_error("barrier", "threads disagree on a barrier's count", [&] { run(barrier_counts_differ, 64, p); });
  expect_error("deadlock", "a named barrier is never filled", [&] { run(barrier_never_filled, 64, p); });
  expect_error("divergence", "mma by half a warp", [&] { run(mma_by_half_a_warp, 32, p); });
  expect_error("trap", "__trap", [&] { run(traps, 32, p); });
  expect_error("mbarrier", "an mbarrier never initialised", [&] { run(mbarrier_never_initialised, 1, p); });
  expect_error("shared-out-of-bounds", "parts larger than the launch's shared memory",
               [&] { run(carves_too_much, 32, p); });
  expect_error("shared-layout", "threads carve differently", [&] { run(carves_differently, 32, p); });
  expect_error("misaligned", "cp.async off its alignment", [&] { run(misaligned_copy, 1, p); });
  expect_error("misaligned", "a vector load off its alignment", [&] { run(misaligned_load, 1, p); });
  expect_error("async-not-waited", "cp.async never waited for", [&] { run(copy_never_waited_for, 16, p); });
  expect_error("global-out-of-bounds", "a vector store past a buffer",
               [&] { run(vector_past_the_end, 16, {out.data(), nullptr, 4}); });
  expect_error("global-out-of-bounds", "cp.async from past a buffer",
               [&] { run(copies_past_the_end, 16, {nullptr, in.data(), 4}); });
  expect_error("write-to-input", "a store to an input", [&] { run(writes_an_input, 16, p); });
  expect_error("launch", "more shared memory than the card has", [&] { run(traps, 32, p, 240000); });
  expect_error("launch", "2048 threads", [&] { run(traps, 2048, p); });
  expect_error("launch", "an empty grid", [&] { run(traps, 32, p, 0, 0); });
  expect_error("nothing", "bar.arrive on one side, bar.sync on the other", [&] { run(arrive_and_sync, 64, p); });
  expect_error("nothing", "atomics between barriers", [&] { run(atomics, 64, p); });
  expect_error("nothing", "constants of the binary, parameters", [&] { run(reads_constants, 64, p); });
  expect_error("unknown-kernel", "a kernel nobody registered",
               [&] { emu::launch_by_name("kvk::none<3>", {{1}, {32}}, &p, sizeof p); });
  expect_error("device-memory", "buffers that overlap", [&] { emu::adopt(out.data() + 4, 16, emu::Use::output); });
}

void test_checked_builds() {
  const DeviceArray<float> out(64);
  const DeviceArray<float> in(std::vector<float>(64, 1.0f));
  const Params p = {out.data(), in.data(), 0};
  static float host_memory[64];
  std::vector<float> heap_memory(64, 1.0f);
  expect_error("shared-out-of-bounds", "one past a static shared array",
               [&] { run(one_past_a_shared_array, 32, {nullptr, nullptr, 1}); });
  expect_error("global-out-of-bounds", "one past a buffer",
               [&] { run(one_past_a_buffer, 64, {out.data(), nullptr, 1}); });
  expect_error("global-out-of-bounds", "memory of the host",
               [&] { run(reads_host_memory, 64, {out.data(), heap_memory.data(), 0}); });
  expect_error("global-out-of-bounds", "a write to the binary's data",
               [&] { run(one_past_a_buffer, 64, {host_memory, nullptr, 0}); });
  expect_error("uninitialised-shared", "shared memory nobody wrote", [&] { run(reads_unwritten_shared, 32, p); });
  expect_error_under_some_schedule("an exchange without __syncwarp", exchange_without_syncwarp, 32, p);
  expect_error("race", "a shuffle orders no memory", [&] { run(shuffle_is_no_fence, 32, p); });
  expect_error("race", "bar.arrive on the wrong side", [&] { run(arrives_on_the_wrong_side, 64, p); });
  expect_error("race", "a write after another thread's read", [&] { run(write_after_read, 64, p); });
  expect_error("race", "a plain read beside atomics", [&] { run(atomic_and_plain, 64, p); });
  expect_error("nothing", "neighbouring bytes by different threads", [&] { run(bytes_side_by_side, 64, p); });
}

void test_guard_zone() {
  const DeviceArray<float> out(64);
  expect_error("shared-out-of-bounds", "one past a static shared array, by its guard zone",
               [&] { run(one_past_a_shared_array, 32, {out.data(), nullptr, 1}); });
}

}  // namespace
}  // namespace kvk::device

int main() {
  return kvk::emu::run_tests([] {
    kvk::device::test_all_builds();
    if (kvk::emu::checks_every_access()) {
      kvk::device::test_checked_builds();
    } else if (!KVK_EMU_ASAN) {  // ASan would end the program at the access itself
      kvk::device::test_guard_zone();
    }
  });
}
