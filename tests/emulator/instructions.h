// The emulator's side of the ptx:: wrappers and of CUDA's built-in functions, for device code only.
#pragma once

#include <cmath>
#include <source_location>

#include "emulator/emulator.h"
#include "emulator/numbers.h"

namespace kvk::emu {

using Loc = std::source_location;

// Ends the launch with an Error. Through the macro: from begin_report on, the checker is off, so that the library code that
// builds the message may come from a checked file.
[[noreturn]] void fail(const char* kind, const std::string& message);
void begin_report();
#define KVK_EMU_FAIL(kind, ...) (::kvk::emu::begin_report(), ::kvk::emu::fail(kind, __VA_ARGS__))

struct Index3 {
  unsigned x, y, z;
};
// A fiber's own indices never change while it runs, so the compiler may reuse the result.
[[gnu::const]] Index3 thread_index();
[[gnu::const]] Index3 block_index();
[[gnu::const]] Dim3 block_dim();
[[gnu::const]] Dim3 grid_dim();
[[gnu::const]] unsigned lane_index();

// ---- memory. Ordinary loads and stores reach the checker through the compiler's hooks (hooks.cc), in race builds;
// these, in all builds.
void read(void* to, const void* from, size_t bytes, Loc loc);
void read_const(void* to, const void* from, size_t bytes, Loc loc);  // of memory that nothing writes during the launch
void write(void* to, const void* from, size_t bytes, Loc loc);
void thread_fence(bool whole_device);
void copy_unchecked(void* to, const void* from, size_t bytes);
uint32_t atom_add_acq_rel(uint32_t* p, uint32_t v, Loc loc);
void atomic_access(const void* p, size_t bytes, Loc loc);  // before the read-modify-write itself, which the caller does

// ---- shared memory
uint32_t smem_offset(const void* p);
void* smem_take(uint32_t index, size_t bytes, size_t align, Loc loc);
void* static_smem(const void* key, size_t bytes, size_t align);
// Site is the type of a lambda: one for each KVK_SHARED and each instantiation around it.
template <class T, class Site>
T& shared_object(Site) {
  static const char key = 0;
  return *static_cast<T*>(static_smem(&key, sizeof(T), alignof(T)));
}

// ---- barriers and warp collectives
enum class Collective : uint8_t {
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_and,
  reduce_or,
  reduce_xor,
  match_any,
  syncwarp,
  ldmatrix,
  mma,
};
int barrier(int id, int threads, bool wait, Loc loc, int predicate = 0);  // threads 0 = the block; sum of predicates
void syncwarp(uint32_t mask, Loc loc);
uint64_t shuffle(Collective kind, uint32_t mask, uint64_t value, int source, Loc loc);
uint32_t vote(Collective kind, uint32_t mask, bool predicate, Loc loc);
uint32_t reduce(Collective kind, uint32_t mask, uint32_t value, bool is_signed, Loc loc);
uint32_t match_any(uint32_t mask, uint64_t value, Loc loc);

// ---- cp.async, mbarrier, bulk copies
void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t src_bytes, Loc loc);
void cp_async_commit();
void cp_async_wait(int pending);
void mbar_init(uint64_t* bar, uint32_t count, Loc loc);
void mbar_arrive(uint64_t* bar, uint32_t expect_bytes, Loc loc);
void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc);
void proxy_fence();
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Loc loc);
void tma_load(void* dst, const void* map, uint64_t* bar, int rank, const int* at, Loc loc);

// What the emulator keeps in the 128 bytes of a device::TensorMap.
struct TensorMapContents {
  const void* base;
  uint32_t rank, element_bytes;
  uint64_t dim[5], stride_bytes[5];  // stride_bytes[0] is element_bytes
  uint32_t box[5];
  uint32_t swizzle_bytes;  // 0, 32, 64 or 128
};
// Checks what the driver would check, and fills the map.
void encode_tensor_map(void* map, const TensorMapContents& contents);

// ---- matrix instructions
void ldmatrix(uint32_t* r, const void* row, int count, bool transposed, Loc loc);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Loc loc);
void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, Loc loc);
struct Wgmma {
  float* d;
  int n;
  bool is_bf16, accumulate;
  uint64_t desc_a, desc_b;
  const uint32_t* a;  // null: A is behind desc_a
  bool transpose_b;
};
void wgmma_fence();
void wgmma(const Wgmma& op, Loc loc);
void wgmma_commit(Loc loc);
void wgmma_wait(int pending, Loc loc);
void set_max_registers(Loc loc);

// ---- arithmetic
inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector, Loc loc);
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t y = 0;
  for (int k = 0; k < 8; ++k) {
    if (table >> k & 1) y |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return y;
}

}  // namespace kvk::emu
