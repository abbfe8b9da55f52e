// Dynamic shared memory, handed out part by part.
#pragma once

#include "kvk/device/lang.h"

namespace kvk::device {

// Bytes that the same sequence of SmemCarver::take calls needs; for the launch code.
//   constexpr size_t bytes = SmemBytes().add<bf16>(n, 128).add<float>(m).total;
struct SmemBytes {
  size_t total = 0;

  template <class T>
  KVK_HOST_DEVICE constexpr SmemBytes add(size_t count, size_t align = 16) const {
    return {round_up(total, align) + count * sizeof(T)};
  }
};

#if !KVK_EMULATOR
// One name and one alignment for every kernel of a translation unit; a 128-byte swizzle needs 1024.
extern __shared__ __align__(1024) unsigned char kvk_dynamic_smem[];
#endif

// Every thread of the block takes the same parts in the same order. The emulator puts a guard zone after each part, so
// never compute the address of one part from another's.
class SmemCarver {
 public:
#if KVK_EMULATOR
  template <class T>
  T* take(size_t count, size_t align = 16 KVK_LOC) {
    return static_cast<T*>(emu::smem_take(next_++, count * sizeof(T), align, loc));
  }

 private:
  uint32_t next_ = 0;
#else
  template <class T>
  KVK_DEVICE T* take(size_t count, size_t align = 16) {
    const size_t at = round_up(used_, align);
    used_ = at + count * sizeof(T);
    return reinterpret_cast<T*>(kvk_dynamic_smem + at);
  }

 private:
  size_t used_ = 0;
#endif
};

}  // namespace kvk::device
