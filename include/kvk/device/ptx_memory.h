// Loads, prefetches and atomics of global memory that plain C++ does not express, and shared-memory addresses.
#pragma once

#include "kvk/device/lang.h"

namespace kvk::device::ptx {

// The 32-bit shared-window address of a pointer into shared memory.
KVK_DEVICE uint32_t smem_u32(const void* p) {
#if KVK_EMULATOR
  return emu::smem_offset(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// 16 bytes of global memory that nothing writes during the launch and that are read once: they bypass L1.
KVK_DEVICE uint4 ld_global_nc_16(const void* p KVK_LOC) {
#if KVK_EMULATOR
  uint4 v;
  emu::read_const(&v, p, 16, loc);
  return v;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#endif
}

// Asks for the line of p in L2; any address is allowed.
KVK_DEVICE void prefetch_l2(const void* p) {
#if KVK_EMULATOR
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Adds and returns the old value, with release before and acquire after for the whole card: what a "last block
// finishes" counter needs. The block's writes must be ordered before it by __syncthreads.
KVK_DEVICE uint32_t atom_add_acq_rel(uint32_t* p, uint32_t v KVK_LOC) {
#if KVK_EMULATOR
  return emu::atom_add_acq_rel(p, v, loc);
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
#endif
}

}  // namespace kvk::device::ptx
