#include "emulator/fiber.h"

#include <sys/mman.h>

#include "emulator/emulator.h"
#if KVK_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if KVK_EMU_OWN_SWITCH
// Saves what the System V ABI lets a callee change not, swaps the stack pointers and returns on the other stack.
extern "C" void kvk_emu_switch(void** save, void* load);
asm(R"(
.text
.globl kvk_emu_switch
.hidden kvk_emu_switch
.type kvk_emu_switch, @function
kvk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvk_emu_switch, .-kvk_emu_switch
)");
#endif

#if KVK_EMU_ASAN
// A kernel that fails leaves its threads' stacks, and the strings of its message, as they are.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace kvk::emu {
namespace {
constexpr unsigned kMaxFibers = 1024;
constexpr size_t kGuard = 4096;
}  // namespace

void FiberStacks::reserve(size_t bytes) {
  if (base_ && stride_ == bytes + kGuard) return;
  if (base_) munmap(base_, size_);
  stride_ = bytes + kGuard;
  size_ = stride_ * kMaxFibers;
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("emulator", "cannot reserve the fibers' stacks");
  base_ = static_cast<char*>(p);
  prepared_ = 0;
}

void FiberStacks::prepare(Fiber& fiber, unsigned index, size_t bytes, void (*entry)()) {
  reserve(bytes);
  char* stack = base_ + index * stride_ + kGuard;
  for (; prepared_ <= index; ++prepared_) mprotect(base_ + prepared_ * stride_, kGuard, PROT_NONE);
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.asan_fake_stack = nullptr;
#if KVK_EMU_ASAN
  __asan_unpoison_memory_region(stack, bytes);
#endif
#if KVK_EMU_OWN_SWITCH
  auto* top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // a return address of 0 ends back traces, and leaves the stack as the ABI wants it at an entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#if KVK_EMU_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if KVK_EMU_OWN_SWITCH
  kvk_emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if KVK_EMU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Fiber& origin) {
#if KVK_EMU_ASAN
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!origin.stack) {  // the first fiber comes from there, and ASan must know the way back
    origin.stack = static_cast<char*>(const_cast<void*>(stack));
    origin.stack_bytes = bytes;
  }
#endif
}

}  // namespace kvk::emu
