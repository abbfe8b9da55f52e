// Device buffers: what is known of every piece of global memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "emulator/checker.h"
#include "emulator/emulator.h"

namespace kvk::emu {

struct Buffer {
  uintptr_t begin = 0;
  size_t bytes = 0;
  Use use = Use::input;
  std::string name;
  bool adopted = false;
  Shadow shadow;

  bool holds(uintptr_t address) const { return address - begin < bytes; }
};

class Buffers {
 public:
  static Buffers& instance();
  Buffer& add(const void* p, size_t bytes, Use use, const char* name, bool adopted);
  void remove(const void* p, bool adopted);
  // The buffer that holds the address, or null.
  Buffer* find(const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    Buffer* recent = recent_[address >> 12 & 63];
    if (recent && recent->holds(address)) return recent;
    return search(address);
  }
  Buffer& at(const void* p, size_t bytes);    // for the host: throws when the bytes are not in one buffer
  std::string describe(const void* p) const;  // "64 bytes past the end of 'out' (1024 bytes)"
  bool empty() const { return sorted_.empty(); }

 private:
  Buffer* search(uintptr_t address);
  std::vector<std::unique_ptr<Buffer>> sorted_;  // by begin
  Buffer* recent_[64] = {};                      // by page
};

}  // namespace kvk::emu
