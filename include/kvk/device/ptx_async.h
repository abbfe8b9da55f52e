// cp.async: copies from global to shared memory that run beside the threads.
#pragma once

#include "kvk/device/ptx_memory.h"

namespace kvk::device::ptx {

// Starts a copy of kBytes (4, 8 or 16; both addresses so aligned) to shared memory. When `valid` is false the
// destination is filled with zeros and `src` is not read. 16-byte copies bypass L1.
template <int kBytes>
KVK_DEVICE void cp_async(void* dst, const void* src, bool valid = true KVK_LOC) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if KVK_EMULATOR
  emu::cp_async(dst, src, kBytes, valid ? kBytes : 0, loc);
#else
  const int src_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_u32(dst)), "l"(src), "r"(src_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %3, %2;" ::"r"(smem_u32(dst)), "l"(src),
                 "r"(src_bytes), "n"(kBytes)
                 : "memory");
  }
#endif
}

// Closes the group of this thread's copies since the last commit; an empty group counts.
KVK_DEVICE void cp_async_commit() {
#if KVK_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's latest groups are still under way. Other threads see the data only
// after a barrier that follows.
template <int kPending>
KVK_DEVICE void cp_async_wait() {
#if KVK_EMULATOR
  emu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace kvk::device::ptx
