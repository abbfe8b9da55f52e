// sm_90 and later: bulk copies (TMA) that report to an mbarrier, the fence between the two memory proxies, and, for
// sm_90a, the hand-over of registers between warpgroups.
#pragma once

#include "kvk/device/ptx_barrier.h"
#include "kvk/device/tensor_map.h"

namespace kvk::device::ptx {

#if KVK_HAS_TMA

// Makes mbar_init visible to the copy engine.
KVK_DEVICE void mbar_init_fence() {
#if KVK_EMULATOR
  emu::proxy_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives and announces `bytes` that bulk copies will bring in this phase.
KVK_DEVICE void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes KVK_LOC) {
#if KVK_EMULATOR
  emu::mbar_arrive(bar, bytes, loc);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
#endif
}

// Between ordinary stores to shared memory and reads of them by wgmma or a bulk copy: every writing thread executes it,
// then a barrier.
KVK_DEVICE void fence_proxy_async() {
#if KVK_EMULATOR
  emu::proxy_fence();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if !KVK_EMULATOR
// Both name the block's own shared memory. shared::cta needs PTX 8.6, which every compiler that knows sm_100 has; with
// shared::cluster ptxas keeps a stack frame for sm_120.
#if KVK_ARCH >= 1000
#define KVK_BULK_DESTINATION "shared::cta"
#else
#define KVK_BULK_DESTINATION "shared::cluster"
#endif
#endif

// Copies `bytes` contiguous bytes (a multiple of 16, both addresses 16-byte aligned) to shared memory.
KVK_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar KVK_LOC) {
#if KVK_EMULATOR
  emu::bulk_load(dst, src, bytes, bar, loc);
#else
  asm volatile("cp.async.bulk." KVK_BULK_DESTINATION
               ".global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_u32(dst)),
               "l"(src), "r"(bytes), "r"(smem_u32(bar))
               : "memory");
#endif
}

// Copies the map's box at element coordinates (x, y, ...), innermost first, to shared memory, swizzled as the map says
// and with zeros for what lies outside the tensor. The map lies in a __grid_constant__ parameter.
KVK_DEVICE void tma_load_2d(void* dst, const TensorMap* map, uint64_t* bar, int x, int y KVK_LOC) {
#if KVK_EMULATOR
  const int at[2] = {x, y};
  emu::tma_load(dst, map, bar, 2, at, loc);
#else
  asm volatile("cp.async.bulk.tensor.2d." KVK_BULK_DESTINATION
               ".global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_u32(dst)),
               "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y)
               : "memory");
#endif
}
KVK_DEVICE void tma_load_3d(void* dst, const TensorMap* map, uint64_t* bar, int x, int y, int z KVK_LOC) {
#if KVK_EMULATOR
  const int at[3] = {x, y, z};
  emu::tma_load(dst, map, bar, 3, at, loc);
#else
  asm volatile("cp.async.bulk.tensor.3d." KVK_BULK_DESTINATION
               ".global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_u32(dst)),
               "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z)
               : "memory");
#endif
}
KVK_DEVICE void tma_load_4d(void* dst, const TensorMap* map, uint64_t* bar, int x, int y, int z, int w KVK_LOC) {
#if KVK_EMULATOR
  const int at[4] = {x, y, z, w};
  emu::tma_load(dst, map, bar, 4, at, loc);
#else
  asm volatile("cp.async.bulk.tensor.4d." KVK_BULK_DESTINATION
               ".global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_u32(dst)),
               "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
#endif
}
KVK_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if KVK_EMULATOR
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

#undef KVK_BULK_DESTINATION

#endif  // KVK_HAS_TMA

#if KVK_HAS_WGMMA

// Raises or lowers the registers a thread of this warpgroup may use; all its threads execute it. Effective only in a
// kernel whose launch bounds name the blocks per multiprocessor.
template <int kRegisters>
KVK_DEVICE void set_max_registers_up(KVK_ONLY_LOC) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if KVK_EMULATOR
  emu::set_max_registers(loc);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
KVK_DEVICE void set_max_registers_down(KVK_ONLY_LOC) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if KVK_EMULATOR
  emu::set_max_registers(loc);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#endif  // KVK_HAS_WGMMA

}  // namespace kvk::device::ptx
