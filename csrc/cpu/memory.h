// Aligned memory for workers.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kvk::cpu {

inline constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
using Buffer = std::unique_ptr<char, AlignedDelete>;

inline Buffer allocate(int64_t bytes) {
  return Buffer(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
}

}  // namespace kvk::cpu
