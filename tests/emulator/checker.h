// What the emulator remembers of every byte a kernel may touch: who wrote and read it last, and whether anybody ever
// wrote it. Only race builds (KVK_EMU_RACE) keep it.
//
// Threads of a block are ordered by vector clocks: clock(t)[u] is the last step of thread u that thread t has
// synchronised with. Slots past the block's threads belong to the copy engines. Blocks are ordered by fences and atomics
// (blocks.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#ifndef KVK_EMU_RACE
#define KVK_EMU_RACE 0
#endif

namespace kvk::emu {

constexpr unsigned kCopyEngines = 16;

// A place in the program: the offset of a code address in the binary; 0 unknown.
using Site = uint32_t;
Site site_of(const void* code_address);
std::string describe(Site site);

using Clock = std::vector<uint32_t>;

// One step of one thread of one block.
struct Step {
  uint32_t block, clock;
  Site site;
  uint16_t thread;
};

enum class Access : uint8_t { read, write, atomic, async_issue, async_landed };

struct Cell {
  enum Flag : uint8_t {
    kDefined = 1,   // somebody wrote it
    kWritten = 2,   // in this epoch, by `write`
    kAtomic = 4,    // ... atomically
    kInFlight = 8,  // destination of a cp.async that nobody has waited for
    kAsync = 16,    // written through the async proxy or by a finished copy
  };
  static constexpr int kReaders = 3;
  uint32_t epoch = 0;  // of everything but kDefined
  uint8_t flags = 0, readers = 0, next_reader = 0;
  Step write = {};
  Step read[kReaders] = {};
};

// The cells of a stretch of memory. A cell covers 16 bytes until a smaller or unaligned access asks for finer ones.
class Shadow {
 public:
  Shadow() = default;
  Shadow(const void* base, size_t bytes) : base_(reinterpret_cast<uintptr_t>(base)), bytes_(bytes) {}
  Shadow(Shadow&& other) noexcept { swap(other); }
  Shadow& operator=(Shadow&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Shadow();

  struct Span {
    Cell* begin;
    Cell* end;
  };
  Span cells(const void* p, size_t bytes);
  uintptr_t address(const Cell& cell) const { return base_ + (size_t(&cell - cells_) << log2_cell_); }
  size_t cell_bytes() const { return size_t{1} << log2_cell_; }
  void mark_defined(const void* p, size_t bytes);
  size_t undefined_bytes();

 private:
  void swap(Shadow& other);
  void refine(int log2_cell);
  uintptr_t base_ = 0;
  size_t bytes_ = 0, count_ = 0;
  int log2_cell_ = 4;
  Cell* cells_ = nullptr;
};

}  // namespace kvk::emu
