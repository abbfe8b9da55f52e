// Named barriers and mbarriers. __syncthreads() and __syncwarp() are used as they are.
#pragma once

#include "kvk/device/ptx_memory.h"

namespace kvk::device::ptx {

// Named barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads, a multiple of 32, whole warps at a time.
// arrive does not wait; one side arrives, the other syncs, and `threads` counts both.
KVK_DEVICE void bar_sync(int id, int threads KVK_LOC) {
#if KVK_EMULATOR
  emu::barrier(id, threads, true, loc);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
KVK_DEVICE void bar_arrive(int id, int threads KVK_LOC) {
#if KVK_EMULATOR
  emu::barrier(id, threads, false, loc);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// An mbarrier in shared memory: a phase ends when `count` arrivals and all announced bytes are in. One thread
// initialises it; mbar_init_fence and a block barrier must come before anyone else uses it.
KVK_DEVICE void mbar_init(uint64_t* bar, uint32_t count KVK_LOC) {
#if KVK_EMULATOR
  emu::mbar_init(bar, count, loc);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory");
#endif
}
KVK_DEVICE void mbar_arrive(uint64_t* bar KVK_LOC) {
#if KVK_EMULATOR
  emu::mbar_arrive(bar, 0, loc);
#else
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(smem_u32(bar)) : "memory");
#endif
}

#if !KVK_EMULATOR
// Whether the phase of that parity has ended; may suspend the thread for a while where the hardware can.
KVK_DEVICE bool mbar_test(uint64_t* bar, uint32_t parity) {
  uint32_t done;
#if KVK_ARCH >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(smem_u32(bar)), "r"(parity)
               : "memory");
#else
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(smem_u32(bar)), "r"(parity)
               : "memory");
#endif
  return done != 0;
}
#endif

// Waits until the phase of that parity has ended. A fresh barrier is in phase 0; waiting for parity 1 returns at once.
KVK_DEVICE void mbar_wait(uint64_t* bar, uint32_t parity KVK_LOC) {
#if KVK_EMULATOR
  emu::mbar_wait(bar, parity, loc);
#else
  while (!mbar_test(bar, parity)) {
  }
#endif
}

}  // namespace kvk::device::ptx
