// The compiler's -fsanitize=thread hooks, defined here instead of linking ThreadSanitizer: in race builds every ordinary
// load and store of a kernel calls one.
#include <cstring>

#include "emulator/scheduler.h"

#if KVK_EMU_RACE

namespace {

// Not inlined into the hooks' callers' frames: `code` is the address in the kernel.
inline void check(const void* p, size_t bytes, bool is_write, const void* code) {
  using namespace kvk::emu;
  if (!current_thread || reporting || current_block->stacks.contains(p)) return;
  check_access(p, bytes, is_write ? Access::write : Access::read, Loc(), site_of(code));
}

// Accesses of several elements (struct copies, memset): cells need no alignment of theirs.
inline void check_range(const void* p, size_t bytes, bool is_write, const void* code) {
  if (bytes == 0) return;
  const auto* at = static_cast<const unsigned char*>(p);
  while (bytes) {
    size_t step = 16;
    while (step > bytes || reinterpret_cast<uintptr_t>(at) % step) step /= 2;
    check(at, step, is_write, code);
    at += step;
    bytes -= step;
  }
}

}  // namespace

#define KVK_EMU_HOOK(name, bytes, is_write) \
  void __tsan_##name##bytes(void* p) { check(p, bytes, is_write, __builtin_return_address(0)); }
#define KVK_EMU_HOOKS(bytes)                 \
  KVK_EMU_HOOK(read, bytes, false)           \
  KVK_EMU_HOOK(write, bytes, true)           \
  KVK_EMU_HOOK(volatile_read, bytes, false)  \
  KVK_EMU_HOOK(volatile_write, bytes, true)  \
  KVK_EMU_HOOK(unaligned_read, bytes, false) \
  KVK_EMU_HOOK(unaligned_write, bytes, true)

// Atomics of host code in instrumented files (function-local statics, shared_ptr), and of kernels never: those go through
// the emulator.
#define KVK_EMU_ATOMICS(bits, T)                                                                                    \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {                    \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {                      \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }

extern "C" {
KVK_EMU_HOOKS(1)
KVK_EMU_HOOKS(2)
KVK_EMU_HOOKS(4)
KVK_EMU_HOOKS(8)
KVK_EMU_HOOKS(16)
KVK_EMU_ATOMICS(8, uint8_t)
KVK_EMU_ATOMICS(16, uint16_t)
KVK_EMU_ATOMICS(32, uint32_t)
KVK_EMU_ATOMICS(64, uint64_t)
void __tsan_read_range(void* p, size_t bytes) { check_range(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { check_range(p, bytes, true, __builtin_return_address(0)); }
// clang's names of the library calls.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, false, __builtin_return_address(0));
  check_range(to, bytes, true, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, false, __builtin_return_address(0));
  check_range(to, bytes, true, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  check_range(to, bytes, true, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
}

#endif
