#include "emulator/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "emulator/fiber.h"
#if KVK_EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kvk::emu {
namespace {

constexpr size_t kAlign = 256;

void poison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if KVK_EMU_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if KVK_EMU_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

// Addresses for device_malloc: never reused until the heap is empty, so that a stale pointer is always caught.
class Heap {
 public:
  static Heap& instance() {
    static Heap heap;
    return heap;
  }
  void* take(size_t bytes) {
    const size_t span = (bytes + kAlign - 1) / kAlign * kAlign + kAlign;
    if (!base_ || top_ + span > kReserved) reserve();
    if (top_ + span > kReserved) throw Error("device-memory", "the emulated device memory is exhausted");
    char* p = base_ + top_;
    top_ += span;
    ++live_;
    unpoison(p, bytes);
    std::memset(p, 0xff, bytes);
    poison(p + bytes, span - bytes);
    return p;
  }
  void give_back(void* p, size_t bytes) {
    poison(p, bytes);
    const auto page = uintptr_t{4096};
    const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    if (--live_ == 0) top_ = kAlign;
  }

 private:
  static constexpr size_t kReserved = size_t{1} << 36;
  void reserve() {
    if (base_) return;
    void* p = mmap(nullptr, kReserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error("device-memory", "cannot reserve the emulated device memory");
    base_ = static_cast<char*>(p);
    poison(base_, kAlign);
  }
  char* base_ = nullptr;
  size_t top_ = kAlign, live_ = 0;
};

}  // namespace

Buffers& Buffers::instance() {
  static Buffers buffers;
  return buffers;
}

Buffer* Buffers::search(uintptr_t address) {
  const auto after = std::upper_bound(sorted_.begin(), sorted_.end(), address,
                                      [](uintptr_t a, const auto& buffer) { return a < buffer->begin; });
  if (after == sorted_.begin()) return nullptr;
  Buffer* buffer = std::prev(after)->get();
  if (!buffer->holds(address)) return nullptr;
  return recent_[address >> 12 & 63] = buffer;
}

Buffer& Buffers::add(const void* p, size_t bytes, Use use, const char* name, bool adopted) {
  auto buffer = std::make_unique<Buffer>();
  buffer->begin = reinterpret_cast<uintptr_t>(p);
  buffer->bytes = bytes;
  buffer->use = use;
  buffer->name = name;
  buffer->adopted = adopted;
  buffer->shadow = Shadow(p, bytes);
  const auto after = std::upper_bound(sorted_.begin(), sorted_.end(), buffer->begin,
                                      [](uintptr_t a, const auto& other) { return a < other->begin; });
  const bool overlaps_after = after != sorted_.end() && buffer->begin + bytes > (*after)->begin;
  const bool overlaps_before =
      after != sorted_.begin() && (*std::prev(after))->begin + (*std::prev(after))->bytes > buffer->begin;
  if (overlaps_after || overlaps_before) throw Error("device-memory", std::string(name) + " overlaps another buffer");
  return **sorted_.insert(after, std::move(buffer));
}

void Buffers::remove(const void* p, bool adopted) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto found = std::find_if(sorted_.begin(), sorted_.end(), [&](const auto& buffer) {
    return buffer->begin == address && buffer->adopted == adopted;
  });
  if (found == sorted_.end()) throw Error("device-memory", "not the start of a device buffer");
  std::fill(std::begin(recent_), std::end(recent_), nullptr);
  sorted_.erase(found);
}

Buffer& Buffers::at(const void* p, size_t bytes) {
  Buffer* buffer = find(p);
  if (!buffer || reinterpret_cast<uintptr_t>(p) - buffer->begin + bytes > buffer->bytes) {
    throw Error("device-memory", "the host addresses bytes that are not in one device buffer");
  }
  return *buffer;
}

std::string Buffers::describe(const void* p) const {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const Buffer* nearest = nullptr;
  size_t distance = 0;
  for (const auto& buffer : sorted_) {
    const uintptr_t end = buffer->begin + buffer->bytes;
    const size_t d = address < buffer->begin ? buffer->begin - address : address >= end ? address - end : 0;
    if (nearest && d >= distance) continue;
    nearest = buffer.get();
    distance = d;
  }
  if (!nearest || distance > size_t{1} << 40) return "far from every device buffer";
  const std::string name = "'" + nearest->name + "' (" + std::to_string(nearest->bytes) + " bytes)";
  if (nearest->holds(address)) return std::to_string(address - nearest->begin) + " bytes into " + name;
  const bool before = address < nearest->begin;
  return std::to_string(distance) + (before ? " bytes before " : " bytes past the end of ") + name;
}

void* device_malloc(size_t bytes, Use use, const char* name) {
  bytes = std::max<size_t>(bytes, 1);
  void* p = Heap::instance().take(bytes);
  Buffers::instance().add(p, bytes, use, name, false);
  return p;
}

void device_free(void* p) {
  if (!p) return;
  const size_t bytes = Buffers::instance().at(p, 1).bytes;
  Buffers::instance().remove(p, false);
  Heap::instance().give_back(p, bytes);
}

void adopt(void* p, size_t bytes, Use use, const char* name) { Buffers::instance().add(p, bytes, use, name, true); }

void abandon(void* p) { Buffers::instance().remove(p, true); }

void device_write(void* dst, const void* src, size_t bytes) {
  if (!bytes) return;
  Buffer& buffer = Buffers::instance().at(dst, bytes);
  std::memcpy(dst, src, bytes);
  if (KVK_EMU_RACE) buffer.shadow.mark_defined(dst, bytes);
}

void device_fill(void* dst, int byte, size_t bytes) {
  if (!bytes) return;
  Buffer& buffer = Buffers::instance().at(dst, bytes);
  std::memset(dst, byte, bytes);
  if (KVK_EMU_RACE) buffer.shadow.mark_defined(dst, bytes);
}

size_t unwritten_bytes(const void* p) {
  Buffer& buffer = Buffers::instance().at(p, 1);
  if (!KVK_EMU_RACE) throw Error("emulator", "only a build that checks every access knows what was written");
  return buffer.use == Use::output ? buffer.shadow.undefined_bytes() : 0;
}

bool checks_every_access() { return KVK_EMU_RACE; }

}  // namespace kvk::emu
