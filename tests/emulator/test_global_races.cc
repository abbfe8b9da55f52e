// Global memory: races within a block and between blocks, fences, memory that nobody wrote, coverage of outputs. Only
// builds that check every access can tell.
#include "emulator/harness.h"
#include "kvk/device/ptx.h"
#include "kvk/device/types.h"

namespace kvk::device {
namespace {

using emu::DeviceArray;
using emu::expect;
using emu::expect_error;
using emu::Use;

struct Params {
  float* out = nullptr;
  float* partial = nullptr;  // a workspace
  uint32_t* counter = nullptr;
  int choice = 0;
};

#define KERNEL(name)    \
  template <int kDummy> \
  void name([[maybe_unused]] const Params p)
#define RUN(name, blocks, threads, p) \
  KVK_EMU_LAUNCH((emu::LaunchConfig{{unsigned(blocks)}, {unsigned(threads)}}), p, name<0>)

KERNEL(each_its_own) { p.out[blockIdx.x * 64 + threadIdx.x] = float(threadIdx.x); }
KERNEL(two_threads_one_place) { p.out[threadIdx.x / 2] = 1.0f; }
KERNEL(two_blocks_one_place) { p.out[threadIdx.x] = float(blockIdx.x); }
KERNEL(vectors_overlap) {
  if (threadIdx.x < 2) store_words(p.out + threadIdx.x * 4, Words<4>{});
  if (threadIdx.x == 2) p.out[5] = 1.0f;
}
KERNEL(halves_side_by_side) {
  auto* bytes = reinterpret_cast<uint16_t*>(p.out);
  bytes[blockIdx.x * 64 + threadIdx.x] = uint16_t(threadIdx.x);
}
KERNEL(exchange_in_block) {
  p.partial[threadIdx.x] = float(threadIdx.x);
  if (p.choice == 0) __syncthreads();
  p.out[threadIdx.x] = p.partial[threadIdx.x ^ 32];
}
KERNEL(reads_what_another_block_wrote) {
  if (blockIdx.x == 0) p.partial[threadIdx.x] = 1.0f;
  if (blockIdx.x == 1) p.out[threadIdx.x] = p.partial[threadIdx.x];
}
KERNEL(writes_what_another_block_read) {
  if (blockIdx.x == 0) p.out[threadIdx.x] = p.partial[threadIdx.x];
  if (blockIdx.x == 1) p.partial[threadIdx.x] = 1.0f;
}
KERNEL(all_add) { atomicAdd(p.out + threadIdx.x % 4, 1.0f); }
KERNEL(adds_and_stores) {
  if (blockIdx.x == 0) atomicAdd(p.out, 1.0f);
  if (blockIdx.x == 1 && threadIdx.x == 0) p.out[0] = 0.0f;
}
KERNEL(non_coherent_load_of_own_write) {
  p.partial[threadIdx.x] = 1.0f;
  p.out[threadIdx.x] = __ldg(p.partial + threadIdx.x);
}
KERNEL(reads_workspace) { p.out[threadIdx.x] = p.partial[threadIdx.x + p.choice]; }
KERNEL(writes_most) {
  if (threadIdx.x != 9) p.out[threadIdx.x] = 1.0f;
}

// The last block to arrive adds up what all wrote. `choice`: 0 right; 1 no barrier before the fence; 2 no fence by the
// writer; 3 no fence by the reader; 4 no barrier after the reader's fence; 5 one acquire-release atomic in place of the
// fences, right; 6 like 0 and the last block resets the counter, right.
KERNEL(last_block_sums) {
  p.partial[blockIdx.x * 64 + threadIdx.x] = float(blockIdx.x + 1);
  KVK_SHARED(is_last, int);
  if (p.choice != 1) __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t arrived;
    if (p.choice == 5) {
      arrived = ptx::atom_add_acq_rel(p.counter, 1);
    } else {
      if (p.choice != 2) __threadfence();
      arrived = atomicAdd(p.counter, 1u);
      if (p.choice != 3) __threadfence();
    }
    is_last = arrived + 1 == gridDim.x;
  }
  if (p.choice == 4) {
    __shfl_sync(0xffffffffu, 0, 0);
  } else {
    __syncthreads();
  }
  if (!is_last) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) sum += p.partial[b * 64 + threadIdx.x];
  p.out[threadIdx.x] = sum;
  if (p.choice == 6 && threadIdx.x == 5) *p.counter = 0;
}

// Block 0 hands over to block 1 through one counter, block 1 to block 2 through another: block 2 may read block 0's.
KERNEL(chain) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    p.partial[0] = 5.0f;
    __threadfence();
    atomicAdd(p.counter, 1u);
  } else if (blockIdx.x == 1) {
    if (atomicAdd(p.counter, 0u) != 1) return;
    __threadfence();
    atomicAdd(p.counter + 1, 1u);
  } else {
    if (atomicAdd(p.counter + 1, 0u) != 1) return;
    if (p.choice == 0) __threadfence();
    p.out[0] = p.partial[0];
  }
}

const DeviceArray<uint32_t>& zeroed(const DeviceArray<uint32_t>& counter) {
  emu::device_fill(counter.data(), 0, counter.size() * sizeof(uint32_t));
  return counter;
}

void test_within_and_between_blocks() {
  const DeviceArray<float> out(256, "out"), partial(256, "partial");
  const Params p = {out.data(), partial.data()};
  expect_error("nothing", "each thread its own element", [&] { RUN(each_its_own, 4, 64, p); });
  expect_error("race", "two threads of a block, one element", [&] { RUN(two_threads_one_place, 1, 64, p); });
  expect_error("race", "two blocks, one element", [&] { RUN(two_blocks_one_place, 2, 64, p); });
  expect_error("race", "a scalar inside another thread's vector", [&] { RUN(vectors_overlap, 1, 32, p); });
  expect_error("nothing", "neighbouring 16-bit elements", [&] { RUN(halves_side_by_side, 2, 64, p); });
  expect_error("nothing", "an exchange through global memory with a barrier",
               [&] { RUN(exchange_in_block, 1, 64, p); });
  const Params no_barrier = {out.data(), partial.data(), nullptr, 1};
  expect_error("race", "an exchange through global memory without one",
               [&] { RUN(exchange_in_block, 1, 64, no_barrier); });
  expect_error("race", "a block reads what another wrote", [&] { RUN(reads_what_another_block_wrote, 2, 64, p); });
  expect_error("race", "a block writes what another read", [&] { RUN(writes_what_another_block_read, 2, 64, p); });
  emu::device_fill(out.data(), 0, 64);
  expect_error("nothing", "atomics of many blocks", [&] { RUN(all_add, 4, 64, p); });
  expect(out.host()[3] == 64.0f, "atomics add up");
  expect_error("race", "an atomic and a store of two blocks", [&] { RUN(adds_and_stores, 2, 32, p); });
  expect_error("non-coherent-load", "__ldg of what the launch wrote",
               [&] { RUN(non_coherent_load_of_own_write, 1, 64, p); });
}

void test_last_block() {
  const int blocks = 5;
  const DeviceArray<float> out(64, "out");
  const DeviceArray<uint32_t> counter(2, "counter");
  const char* names[] = {"fences and a counter",
                         "no barrier before the fence",
                         "no fence by the writer",
                         "no fence by the reader",
                         "no barrier after the reader's fence",
                         "an acquire-release atomic",
                         "and the last block resets the counter"};
  for (int choice = 0; choice < 7; choice++) {
    const DeviceArray<float> partial(64 * blocks, "partial");
    const bool right = choice == 0 || choice == 5 || choice == 6;
    const Params p = {out.data(), partial.data(), zeroed(counter).data(), choice};
    expect_error(right ? "nothing" : "race", std::string("the last block sums: ") + names[choice],
                 [&] { RUN(last_block_sums, blocks, 64, p); });
    if (right) expect(out.host()[63] == 15.0f, "the sum");
  }
  for (int choice = 0; choice < 2; choice++) {
    const DeviceArray<float> partial(1, "partial");
    const Params p = {out.data(), partial.data(), zeroed(counter).data(), choice};
    emu::Options& o = emu::options();
    const emu::Options before = o;
    o.order = emu::Options::Order::in_order;
    expect_error(choice ? "race" : "nothing", choice ? "a chain without the last fence" : "a chain of hand-overs",
                 [&] { RUN(chain, 3, 32, p); });
    o = before;
  }
}

void test_unwritten() {
  const DeviceArray<float> out(64, "out"), partial(128, "partial");
  emu::device_fill(partial.data(), 0, 64 * sizeof(float));
  const Params p = {out.data(), partial.data()};
  expect_error("nothing", "a workspace that the host filled", [&] { RUN(reads_workspace, 1, 64, p); });
  const Params past = {out.data(), partial.data(), nullptr, 1};
  expect_error("uninitialised-global", "one element that nobody wrote", [&] { RUN(reads_workspace, 1, 64, past); });
  const DeviceArray<float> partly(64, "partly");
  const Params most = {partly.data()};
  RUN(writes_most, 1, 64, most);
  expect(emu::unwritten_bytes(partly.data()) == 4, "the bytes of an output that no thread wrote");
  std::vector<float> host(96, 0.0f);
  {
    const emu::Adopted adopted(host.data(), 64 * sizeof(float), Use::output, "adopted");
    RUN(each_its_own, 1, 64, (Params{host.data()}));
    expect(emu::unwritten_bytes(host.data()) == 0 && host[63] == 63.0f, "adopted memory");
    expect_error("global-out-of-bounds", "past adopted memory",
                 [&] { RUN(each_its_own, 2, 64, (Params{host.data()})); });
  }
}

}  // namespace
}  // namespace kvk::device

int main() {
  return kvk::emu::run_tests([] {
    kvk::emu::expect(kvk::emu::checks_every_access(), "this program is built with the checks");
    kvk::device::test_within_and_between_blocks();
    kvk::device::test_last_block();
    kvk::device::test_unwritten();
  });
}
