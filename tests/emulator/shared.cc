// Shared memory: its parts, guard zones and addresses.
#include <algorithm>
#include <cstring>

#include "emulator/scheduler.h"
#if KVK_EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kvk::emu {
namespace {

constexpr size_t kStaticLimit = size_t{48} << 10;

Segment& add_segment(const void* key, uint32_t index, size_t bytes, size_t align) {
  Block& b = *current_block;
  align = std::max<size_t>(align, 16);
  const size_t offset = (b.top + align - 1) / align * align;
  if (offset + bytes + kGuardBytes > kSmemWindow) KVK_EMU_FAIL("shared-out-of-bounds", "shared memory is exhausted");
  b.top = offset + bytes + kGuardBytes;
  unsigned char* p = b.smem + offset;
#if KVK_EMU_ASAN
  __asan_unpoison_memory_region(p, bytes + kGuardBytes);
#endif
  std::memset(p, 0xff, bytes + kGuardBytes);  // NaN in f32, f16 and bf16
#if KVK_EMU_ASAN
  __asan_poison_memory_region(p + bytes, kGuardBytes);
#endif
  b.segments.push_back({key, index, offset, bytes, Shadow(p, bytes)});
  return b.segments.back();
}

Segment* find_segment(const void* key, uint32_t index) {
  for (Segment& segment : current_block->segments) {
    if (segment.key == key && segment.index == index) return &segment;
  }
  return nullptr;
}

}  // namespace

Segment* segment_of(const void* p, size_t bytes) {
  Block& b = *current_block;
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - b.smem);
  for (Segment& segment : b.segments) {
    if (offset - segment.offset < segment.bytes && offset - segment.offset + bytes <= segment.bytes) return &segment;
  }
  return nullptr;
}

void* smem_take(uint32_t index, size_t bytes, size_t align, Loc loc) {
  Block& b = *current_block;
  Segment* segment = find_segment(nullptr, index);
  if (segment && segment->bytes != bytes) {
    KVK_EMU_FAIL("shared-layout", who(*current_thread) + " carves " + std::to_string(bytes) + " bytes at " +
                                      where(loc) + " where another carved " + std::to_string(segment->bytes));
  }
  if (!segment) {
    b.dynamic_used = (b.dynamic_used + align - 1) / align * align + bytes;
    if (b.dynamic_used > b.dynamic_bytes) {
      KVK_EMU_FAIL("shared-out-of-bounds", "the part carved at " + where(loc) + " ends at byte " +
                                               std::to_string(b.dynamic_used) + " of " +
                                               std::to_string(b.dynamic_bytes) + " bytes that the launch gave");
    }
    segment = &add_segment(nullptr, index, bytes, align);
  }
  return b.smem + segment->offset;
}

void* static_smem(const void* key, size_t bytes, size_t align) {
  Block& b = *current_block;
  Segment* segment = find_segment(key, 0);
  if (!segment) {
    size_t total = bytes;
    for (const Segment& other : b.segments) total += other.key ? other.bytes : 0;
    if (total > kStaticLimit) KVK_EMU_FAIL("shared-out-of-bounds", "over 48 KiB of static shared memory");
    segment = &add_segment(key, 0, bytes, align);
  }
  return b.smem + segment->offset;
}

uint32_t smem_offset(const void* p) {
  if (!in_smem(p)) KVK_EMU_FAIL("address", "not an address of shared memory");
  return uint32_t(static_cast<const unsigned char*>(p) - current_block->smem);
}

}  // namespace kvk::emu
