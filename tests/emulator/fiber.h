// Contexts of execution that share one OS thread: hand-written switch on x86-64 (6 ns), ucontext elsewhere (300 ns).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(KVK_EMU_UCONTEXT)
#define KVK_EMU_OWN_SWITCH 0
#include <ucontext.h>
#else
#define KVK_EMU_OWN_SWITCH 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define KVK_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVK_EMU_ASAN 1
#endif
#endif
#if !defined(KVK_EMU_ASAN)
#define KVK_EMU_ASAN 0
#endif

namespace kvk::emu {

struct Fiber {
#if KVK_EMU_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // null: the OS thread's own stack
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
};

// Stacks of all fibers, one beside the other with guard pages between them.
class FiberStacks {
 public:
  // Gives fiber `index` a stack and makes it start in `entry`.
  void prepare(Fiber& fiber, unsigned index, size_t bytes, void (*entry)());
  bool contains(const void* p) const {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(base_) < size_;
  }

 private:
  void reserve(size_t bytes);
  char* base_ = nullptr;
  size_t size_ = 0, stride_ = 0;
  unsigned prepared_ = 0;
};

// Leaves `from`, which runs, for `to`. `from_ends`: it will never be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool from_ends);
// First thing in a fiber's entry; `origin` is the fiber of the OS thread.
void fiber_started(Fiber& origin);

}  // namespace kvk::emu
