// Warp matrix instructions: ldmatrix and mma.sync. All 32 lanes take part.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A [16 x 16] row-major: a[0] = (g, 2t..2t+1), a[1] = (g + 8, ..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..)
//   B [16 x 8]: b0 = rows 2t, 2t + 1 of column g; b1 = rows 2t + 8, 2t + 9
//   C, D [16 x 8]: d[0], d[1] = (g, 2t), (g, 2t + 1); d[2], d[3] = the same of row g + 8
#pragma once

#include "kvk/device/ptx_memory.h"

namespace kvk::device::ptx {

// Loads 8 x 8 tiles of 16-bit elements: lane 8 i + r gives the address of row r of tile i (16 bytes, 16-byte aligned);
// r[i] of a lane is elements 2t, 2t + 1 of row g of tile i.
KVK_DEVICE void ldmatrix(uint32_t (&r)[1], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 1, false, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(smem_u32(row)) : "memory");
#endif
}
KVK_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 2, false, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(row))
               : "memory");
#endif
}
KVK_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 4, false, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#endif
}

// As ldmatrix, each tile transposed: r[i] of a lane is rows 2t, 2t + 1 of column g of tile i.
KVK_DEVICE void ldmatrix_trans(uint32_t (&r)[1], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 1, true, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(smem_u32(row))
               : "memory");
#endif
}
KVK_DEVICE void ldmatrix_trans(uint32_t (&r)[2], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 2, true, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(row))
               : "memory");
#endif
}
KVK_DEVICE void ldmatrix_trans(uint32_t (&r)[4], const void* row KVK_LOC) {
#if KVK_EMULATOR
  emu::ldmatrix(r, row, 4, true, loc);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#endif
}

// d += a * b for one 16 x 8 tile with k = 16; T is bf16 or f16, accumulation in fp32.
template <class T>
KVK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 KVK_LOC) {
  static_assert(kSameType<T, bf16> || kSameType<T, f16>);
#if KVK_EMULATOR
  emu::mma_m16n8k16(d, a, b0, b1, kSameType<T, bf16>, loc);
#else
  if constexpr (kSameType<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// d += a * b for one 16 x 8 tile of signed bytes with k = 32, exact in int32. A lane's words hold four bytes where the
// 16-bit form holds two elements: a[0] = row g, columns 4t .. 4t + 3, and so on.
KVK_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 KVK_LOC) {
#if KVK_EMULATOR
  emu::mma_m16n8k32_s8(d, a, b0, b1, loc);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace kvk::device::ptx
