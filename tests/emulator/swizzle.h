// The swizzles of tensor maps and matrix descriptors: which 16-byte chunk of a shared-memory address moves where.
#pragma once

#include <cstdint>

namespace kvk::emu {

inline uint32_t swizzled(uint32_t offset, uint32_t swizzle_bytes) {
  const uint32_t row = offset >> 7;
  if (swizzle_bytes == 128) return offset ^ (row & 7) << 4;
  if (swizzle_bytes == 64) return offset ^ (row & 3) << 4;
  if (swizzle_bytes == 32) return offset ^ (row & 1) << 4;
  return offset;
}

}  // namespace kvk::emu
