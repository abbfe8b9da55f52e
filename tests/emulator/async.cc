// Copies that run beside the threads (cp.async, bulk copies) and the mbarriers that announce them.
#include <algorithm>
#include <cstring>

#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "emulator/swizzle.h"

namespace kvk::emu {
namespace {

const uint32_t* clock_of(unsigned thread) { return KVK_EMU_RACE ? current_block->clock(thread) : nullptr; }

// ---------------------------------------------------------------------------------------------- cp.async
void land(CpAsync& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.dst, copy.src, copy.src_bytes);
  std::memset(copy.dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
}

}  // namespace

void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t src_bytes, Loc loc) {
  Block& b = *current_block;
  Thread& t = *current_thread;
  const Site site = site_of(__builtin_return_address(0));
  stats().cp_async++;
  if (!in_smem(dst)) KVK_EMU_FAIL("address", "the destination of cp.async at " + where(loc) + " is not shared memory");
  const bool src_aligned = reinterpret_cast<uintptr_t>(src) % bytes == 0;
  if (!src_aligned || reinterpret_cast<uintptr_t>(dst) % bytes) {
    KVK_EMU_FAIL("misaligned", who(t) + ": cp.async of " + std::to_string(bytes) + " bytes at " + where(loc));
  }
  if (src_bytes) check_global_as(t.index, clock_of(t.index), src, src_bytes, Access::read, loc, site);
  check_shared_as(t.index, clock_of(t.index), dst, bytes, Access::async_issue, loc, site);
  CpAsync copy{static_cast<unsigned char*>(dst),
               static_cast<const unsigned char*>(src),
               bytes,
               src_bytes,
               t.open_group,
               false,
               loc,
               site};
  const auto when = options().async;
  if (when == Options::Async::early || (when == Options::Async::mixed && (b.random() & 1))) {
    land(copy);
  } else {
    std::memset(dst, 0xff, bytes);
  }
  t.copies.push_back(copy);
}

void cp_async_commit() { current_thread->open_group++; }

void cp_async_wait(int pending) {
  Thread& t = *current_thread;
  size_t done = 0;
  for (; done < t.copies.size(); ++done) {
    CpAsync& copy = t.copies[done];
    if (copy.group + uint32_t(pending) >= t.open_group) break;
    land(copy);
    check_shared_as(t.index, clock_of(t.index), copy.dst, copy.bytes, Access::async_landed, copy.loc, copy.site);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + long(done));
}

void check_copies_at_exit(const Thread& t) {
  if (!t.copies.empty()) {
    KVK_EMU_FAIL("async-not-waited",
                 who(t) + " exits with a cp.async that it never waited for, issued at " + where(t.copies.front().loc));
  }
  const auto& in_flight = current_block->warpgroups[t.index / 128].in_flight;
  if (!in_flight.empty()) {
    KVK_EMU_FAIL("async-not-waited",
                 who(t) + " exits with a wgmma that it never waited for, issued at " + where(in_flight.front().loc));
  }
}

// ---------------------------------------------------------------------------------------------- mbarrier
namespace {

MBarrier& mbarrier_at(uint64_t* bar, Loc loc) {
  Block& b = *current_block;
  const auto found = b.mbarriers.find(smem_offset(bar));
  if (found == b.mbarriers.end())
    KVK_EMU_FAIL("mbarrier", "the mbarrier used at " + where(loc) + " was never initialised");
  MBarrier& m = found->second;
  const unsigned me = current_thread->index;
  if (KVK_EMU_RACE && me != m.init_thread && b.clock(me)[m.init_thread] < m.init_clock) {
    KVK_EMU_FAIL("race", who(*current_thread) + " uses at " + where(loc) +
                             " an mbarrier whose initialisation no barrier orders before it");
  }
  return m;
}

void complete_phase_if_due(MBarrier& m) {
  if (m.pending || m.tx_bytes) return;
  m.phase ^= 1;
  m.pending = m.count;
  m.completed = m.arriving;
  for (size_t i = m.waiting.size(); i-- > 0;) make_ready(m.waiting[i]);
  m.waiting.clear();
}

}  // namespace

void mbar_init(uint64_t* bar, uint32_t count, Loc loc) {
  Block& b = *current_block;
  check_access(bar, sizeof *bar, Access::write, loc, site_of(__builtin_return_address(0)));
  *bar = 0;
  const unsigned me = current_thread->index;
  const uint32_t clock = KVK_EMU_RACE ? b.clock(me)[me] : 0;
  b.mbarriers[smem_offset(bar)] = MBarrier{count, count, 0, me, clock, 0, {}, {}, {}};
}

void mbar_arrive(uint64_t* bar, uint32_t expect_bytes, Loc loc) {
  MBarrier& m = mbarrier_at(bar, loc);
  if (m.pending == 0) KVK_EMU_FAIL("mbarrier", "more arrivals than the mbarrier's count, at " + where(loc));
  release_clock(m.arriving, current_thread->index);
  m.tx_bytes += expect_bytes;
  m.pending--;
  complete_phase_if_due(m);
}

void mbar_wait(uint64_t* bar, uint32_t parity, Loc loc) {
  MBarrier& m = mbarrier_at(bar, loc);
  while ((m.phase & 1) == (parity & 1)) {
    m.waiting.push_back(current_thread->index);
    suspend(parity & 1 ? "an mbarrier, parity 1" : "an mbarrier, parity 0", loc);
  }
  acquire_clock(m.completed, current_thread->index);
}

void proxy_fence() {
  if (!KVK_EMU_RACE) return;
  const unsigned me = current_thread->index;
  current_thread->proxy_fence_clock = ++current_block->clock(me)[me];
}

// ---------------------------------------------------------------------------------------------- bulk copies
namespace {

void start(BulkCopy copy) {
  Block& b = *current_block;
  stats().bulk_copies++;
  if (KVK_EMU_RACE) {
    uint32_t* clock = b.clock(copy.thread);
    copy.clock.assign(clock, clock + b.clock_words);
    clock[copy.thread]++;
  }
  b.bulk_copies.push_back(std::move(copy));
  if (options().async == Options::Async::early) {
    while (land_one_bulk_copy()) {
    }
  }
}

// One row of a tensor copy: the box's innermost dimension at the given outer coordinates.
void copy_row(const BulkCopy& copy, const int64_t (&at)[5], uint32_t to) {
  const TensorMapContents& map = copy.map;
  for (uint32_t x = 0; x < map.box[0]; ++x) {
    const auto* from = static_cast<const unsigned char*>(map.base);
    bool inside = true;
    for (uint32_t d = 0; d < map.rank; ++d) {
      const int64_t coordinate = at[d] + (d == 0 ? x : 0);
      inside = inside && coordinate >= 0 && uint64_t(coordinate) < map.dim[d];
      from += coordinate * int64_t(map.stride_bytes[d]);
    }
    unsigned char* dst = current_block->smem + swizzled(to + x * map.element_bytes, map.swizzle_bytes);
    if (inside) {
      check_global_as(copy.thread, KVK_EMU_RACE ? copy.clock.data() : nullptr, from, map.element_bytes, Access::read,
                      copy.loc, copy.site);
      std::memcpy(dst, from, map.element_bytes);
    } else {
      std::memset(dst, 0, map.element_bytes);
    }
  }
}

void copy_box(const BulkCopy& copy) {
  const TensorMapContents& map = copy.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const uint32_t to = smem_offset(copy.dst);
  for (uint32_t row = 0; row < copy.bytes / row_bytes; ++row) {
    int64_t at[5] = {copy.at[0]};
    uint32_t rest = row;
    for (uint32_t d = 1; d < map.rank; ++d) {
      at[d] = copy.at[d] + int64_t{rest % map.box[d]};
      rest /= map.box[d];
    }
    copy_row(copy, at, to + row * row_bytes);
  }
}

}  // namespace

bool land_one_bulk_copy() {
  Block& b = *current_block;
  if (b.bulk_copies.empty()) return false;
  const bool any_order = options().async == Options::Async::mixed || options().order == Options::Order::random;
  const size_t index = any_order ? b.random() % b.bulk_copies.size() : 0;
  static BulkCopy copy;  // not a local: a failing check leaves this function without unwinding
  copy = std::move(b.bulk_copies[index]);
  b.bulk_copies.erase(b.bulk_copies.begin() + long(index));
  // One pseudo thread for each mbarrier slot: copies are not ordered among themselves.
  const unsigned engine = b.size + (smem_offset(copy.bar) >> 3) % kCopyEngines;
  if (KVK_EMU_RACE) copy.clock[engine] = ++b.clock(engine)[engine];
  const uint32_t* clock = KVK_EMU_RACE ? copy.clock.data() : nullptr;
  check_shared_as(engine, clock, copy.dst, copy.bytes, Access::write, copy.loc, copy.site);
  if (copy.src) {
    check_global_as(copy.thread, clock, copy.src, copy.bytes, Access::read, copy.loc, copy.site);
    std::memcpy(copy.dst, copy.src, copy.bytes);
  } else {
    copy_box(copy);
  }
  MBarrier& m = b.mbarriers.at(smem_offset(copy.bar));
  if (KVK_EMU_RACE) {
    if (m.arriving.empty()) m.arriving.assign(b.clock_words, 0);
    for (unsigned i = 0; i < b.clock_words; ++i) m.arriving[i] = std::max(m.arriving[i], copy.clock[i]);
  }
  m.tx_bytes -= copy.bytes;
  complete_phase_if_due(m);
  return true;
}

void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Loc loc) {
  mbarrier_at(bar, loc);
  const bool aligned = (smem_offset(dst) | reinterpret_cast<uintptr_t>(src) | bytes) % 16 == 0;
  if (!aligned || bytes == 0) {
    KVK_EMU_FAIL("misaligned", "bulk copy at " + where(loc) + ": addresses and size must be multiples of 16");
  }
  start({static_cast<unsigned char*>(dst),
         static_cast<const unsigned char*>(src),
         {},
         bar,
         {},
         bytes,
         {},
         current_thread->index,
         loc,
         site_of(__builtin_return_address(0))});
}

void tma_load(void* dst, const void* map, uint64_t* bar, int rank, const int* at, Loc loc) {
  mbarrier_at(bar, loc);
  BulkCopy copy{static_cast<unsigned char*>(dst),    nullptr, {}, bar, {}, 0, {}, current_thread->index, loc,
                site_of(__builtin_return_address(0))};
  std::memcpy(&copy.map, map, sizeof copy.map);
  const TensorMapContents& contents = copy.map;
  if (contents.rank != uint32_t(rank)) {
    KVK_EMU_FAIL("tensor-map", "a map of rank " + std::to_string(contents.rank) + " copied as rank " +
                                   std::to_string(rank) + " at " + where(loc));
  }
  const uint32_t align = contents.swizzle_bytes == 128 ? 1024
                         : contents.swizzle_bytes      ? contents.swizzle_bytes * 8
                                                       : 128;
  if (smem_offset(dst) % align) {
    KVK_EMU_FAIL("misaligned",
                 "the tile copied at " + where(loc) + " must start on a multiple of " + std::to_string(align));
  }
  copy.bytes = contents.element_bytes;
  for (int d = 0; d < rank; ++d) {
    copy.bytes *= contents.box[d];
    copy.at[d] = at[d];
  }
  start(std::move(copy));
}

void encode_tensor_map(void* map, const TensorMapContents& contents) {
  const auto refuse = [](const char* why) { throw Error("tensor-map", std::string("[emulator:tensor-map] ") + why); };
  if (contents.rank < 1 || contents.rank > 5) refuse("rank must be 1 to 5");
  if (reinterpret_cast<uintptr_t>(contents.base) % 16) refuse("the tensor must lie on a multiple of 16 bytes");
  const uint32_t row_bytes = contents.box[0] * contents.element_bytes;
  if (row_bytes % 16) refuse("the box's rows must be multiples of 16 bytes");
  if (contents.swizzle_bytes && row_bytes > contents.swizzle_bytes)
    refuse("the box's rows are longer than the swizzle");
  if (contents.stride_bytes[0] != contents.element_bytes) refuse("the innermost dimension must be contiguous");
  for (uint32_t d = 0; d < contents.rank; ++d) {
    if (contents.box[d] < 1 || contents.box[d] > 256) refuse("box sizes must be 1 to 256");
    if (d > 0 && contents.stride_bytes[d] % 16) refuse("strides must be multiples of 16 bytes");
  }
  static_assert(sizeof contents <= 128);
  std::memset(map, 0, 128);
  std::memcpy(map, &contents, sizeof contents);
}

}  // namespace kvk::emu
