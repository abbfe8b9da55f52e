// Every access a kernel makes: is it inside an object, aligned, to memory somebody wrote, and ordered after what it
// touches?
#include <cstring>
#include <sstream>

#include "emulator/memory.h"
#include "emulator/scheduler.h"

namespace kvk::emu {
namespace {

const char* verb_of(Access access) {
  switch (access) {
    case Access::read: return "reads";
    case Access::write: return "writes";
    case Access::atomic: return "updates";
    case Access::async_issue: return "starts a copy to";
    case Access::async_landed: return "finishes a copy to";
  }
  return "touches";
}

// Whose access is being checked.
struct Actor {
  unsigned thread;        // of the block, or one of the copy engines past its threads
  const uint32_t* clock;  // its vector clock
  Access access;
  Loc loc;
  Site site;
};

std::string name_of_thread(unsigned thread) {
  const Block& b = *current_block;
  return thread < b.size ? who(b.threads[thread]) : "the copy engine";
}

std::string place_of(Site site, Loc loc) {
  const std::string lines = describe(site);
  const bool no_lines = lines.starts_with("code+") || lines.starts_with("an unknown");
  return no_lines && loc.line() ? where(loc) : lines;
}

std::string subject(const Actor& actor, const std::string& object) {
  return name_of_thread(actor.thread) + " " + verb_of(actor.access) + " " + object + " at " +
         place_of(actor.site, actor.loc);
}

[[noreturn]] void report_race(const Actor& actor, const std::string& object, const Step& other, bool other_wrote) {
  begin_report();
  const Block& b = *current_block;
  std::ostringstream s;
  s << subject(actor, object) << "; ";
  if (other.block == b.index) {
    s << name_of_thread(other.thread);
  } else {
    s << "thread " << other.thread << " of block (" << other.block % b.grid.x << ','
      << other.block / b.grid.x % b.grid.y << ',' << other.block / b.grid.x / b.grid.y << ')';
  }
  s << (other_wrote ? " wrote" : " read") << " it at " << describe(other.site) << " and nothing orders the two";
  fail("race", s.str());
}

// Records an access in one cell, or reports what it conflicts with. `ordered(step)`: the actor comes after the step.
// `object()` describes the cell for a report.
template <class Ordered, class Object>
void touch(Cell& cell, uint32_t epoch, const Actor& actor, const Ordered& ordered, const Object& object) {
  if (cell.epoch != epoch) {
    cell.epoch = epoch;
    cell.flags &= Cell::kDefined;
    cell.readers = cell.next_reader = 0;
  }
  if ((cell.flags & Cell::kInFlight) && actor.access != Access::async_landed) {
    KVK_EMU_FAIL("async-in-flight", subject(actor, object()) + ", the destination of a cp.async issued at " +
                                        describe(cell.write.site) + " by " + name_of_thread(cell.write.thread) +
                                        " and not yet waited for");
  }
  const Step step = {current_block->index, actor.clock[actor.thread], actor.site, uint16_t(actor.thread)};
  const bool both_atomic = actor.access == Access::atomic && (cell.flags & Cell::kAtomic);
  if ((cell.flags & Cell::kWritten) && !both_atomic && !ordered(cell.write)) {
    report_race(actor, object(), cell.write, true);
  }
  if (actor.access == Access::read) {
    int slot = 0;
    while (slot < cell.readers && !ordered(cell.read[slot]))
      ++slot;  // a reader that this one comes after is superseded
    if (slot == cell.readers) {
      if (cell.readers < Cell::kReaders) {
        cell.readers++;
      } else {
        slot = cell.next_reader;  // the latest readers are the likeliest to be in a race with a write
        cell.next_reader = uint8_t((slot + 1) % Cell::kReaders);
      }
    }
    cell.read[slot] = step;
    return;
  }
  for (int i = 0; i < cell.readers; ++i) {
    if (!ordered(cell.read[i])) report_race(actor, object(), cell.read[i], false);
  }
  cell.readers = cell.next_reader = 0;
  cell.write = step;
  if (actor.access == Access::async_issue) {
    cell.flags = Cell::kInFlight;  // not kWritten: the landing checks again
    return;
  }
  const bool by_copy = actor.access == Access::async_landed || actor.thread >= current_block->size;
  cell.flags = uint8_t(Cell::kDefined | Cell::kWritten | (actor.access == Access::atomic ? Cell::kAtomic : 0) |
                       (by_copy ? Cell::kAsync : 0));
}

void require_aligned(const void* p, size_t bytes, Loc loc, Site site) {
  if (bytes > 16 || (bytes & (bytes - 1)) || reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  KVK_EMU_FAIL("misaligned", who(*current_thread) + ": access of " + std::to_string(bytes) + " bytes at " +
                                 place_of(site, loc) + " is not aligned to its size");
}

// Memory of neither kind that a kernel may read: its parameters, and constants of the binary.
bool is_constant(const void* p, Access access) {
  const Block& b = *current_block;
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (access != Access::read) return false;
  if (address - reinterpret_cast<uintptr_t>(b.params) < b.params_bytes) return true;
  return address >= b.image_begin && address < b.image_end;
}

}  // namespace

void check_shared_as(unsigned thread, const uint32_t* clock, const void* p, size_t bytes, Access access, Loc loc,
                     Site site) {
  Block& b = *current_block;
  const Actor actor{thread, clock, access, loc, site};
  stats().accesses++;
  Segment* segment = segment_of(p, bytes);
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - b.smem);
  if (!segment) {
    KVK_EMU_FAIL("shared-out-of-bounds",
                 subject(actor, std::to_string(bytes) + " bytes at shared+" + std::to_string(offset)) +
                     ", which are not in one shared object");
  }
  if (!KVK_EMU_RACE) return;
  const auto ordered = [&](const Step& step) { return step.thread == thread || clock[step.thread] >= step.clock; };
  const Shadow::Span span = segment->shadow.cells(p, bytes);
  for (Cell* cell = span.begin; cell != span.end; ++cell) {
    const auto object = [&] {
      return "shared+" + std::to_string(segment->shadow.address(*cell) - reinterpret_cast<uintptr_t>(b.smem));
    };
    if (cell->epoch != b.epoch) cell->flags = 0;  // shared memory starts undefined in every block
    if ((access == Access::read || access == Access::atomic) && !(cell->flags & (Cell::kDefined | Cell::kInFlight))) {
      KVK_EMU_FAIL("uninitialised-shared", subject(actor, object()) + ", which nobody has written");
    }
    touch(*cell, b.epoch, actor, ordered, object);
  }
}

void check_global_as(unsigned thread, const uint32_t* clock, const void* p, size_t bytes, Access access, Loc loc,
                     Site site) {
  Block& b = *current_block;
  const Actor actor{thread, clock, access, loc, site};
  Buffer* buffer = Buffers::instance().find(p);
  if (!buffer && is_constant(p, access)) return;
  stats().accesses++;
  (access == Access::read ? stats().global_read_bytes : stats().global_written_bytes) += bytes;
  const size_t offset = buffer ? reinterpret_cast<uintptr_t>(p) - buffer->begin : 0;
  if (!buffer || offset + bytes > buffer->bytes) {
    KVK_EMU_FAIL("global-out-of-bounds", subject(actor, std::to_string(bytes) + " bytes of global memory") + ", " +
                                             Buffers::instance().describe(p));
  }
  if (access != Access::read && buffer->use == Use::input) {
    KVK_EMU_FAIL("write-to-input", subject(actor, "byte " + std::to_string(offset) + " of '" + buffer->name + "'") +
                                       ", which is an input");
  }
  if (!KVK_EMU_RACE) return;
  const auto ordered = [&](const Step& step) {
    if (step.block == b.index && (step.thread == thread || clock[step.thread] >= step.clock)) return true;
    return b.order.orders(step, uint16_t(thread), clock);
  };
  const Shadow::Span span = buffer->shadow.cells(p, bytes);
  for (Cell* cell = span.begin; cell != span.end; ++cell) {
    const auto object = [&] {
      return "byte " + std::to_string(buffer->shadow.address(*cell) - buffer->begin) + " of '" + buffer->name + "'";
    };
    const bool is_read = access == Access::read || access == Access::atomic;
    if (is_read && buffer->use == Use::output && !(cell->flags & Cell::kDefined)) {
      KVK_EMU_FAIL("uninitialised-global", subject(actor, object()) + ", which nobody has written");
    }
    touch(*cell, b.launch_epoch, actor, ordered, object);
  }
}

void check_access(const void* p, size_t bytes, Access access, Loc loc, Site site) {
  Block& b = *current_block;
  const unsigned thread = current_thread->index;
  const uint32_t* clock = KVK_EMU_RACE ? b.clock(thread) : nullptr;
  if (b.stacks.contains(p)) return;
  require_aligned(p, bytes, loc, site);
  if (in_smem(p)) {
    check_shared_as(thread, clock, p, bytes, access, loc, site);
  } else {
    check_global_as(thread, clock, p, bytes, access, loc, site);
  }
}

void check_async_proxy(const void* p, size_t bytes, Loc loc, Site site) {
  if (!KVK_EMU_RACE) return;
  Block& b = *current_block;
  Segment* segment = segment_of(p, bytes);
  if (!segment) return;  // check_shared_as has reported it
  const Shadow::Span span = segment->shadow.cells(p, bytes);
  for (Cell* cell = span.begin; cell != span.end; ++cell) {
    const bool by_store = cell->epoch == b.epoch && (cell->flags & Cell::kWritten) && !(cell->flags & Cell::kAsync);
    if (!by_store || b.threads[cell->write.thread].proxy_fence_clock > cell->write.clock) continue;
    KVK_EMU_FAIL("proxy-fence", "the asynchronous proxy reads at " + place_of(site, loc) + " what " +
                                    who(b.threads[cell->write.thread]) + " stored at " + describe(cell->write.site) +
                                    " without fence.proxy.async after it");
  }
}

// ---------------------------------------------------------------------------------------------- vector clocks
#if KVK_EMU_RACE

static void join(uint32_t* into, const uint32_t* from, unsigned words) {
  for (unsigned i = 0; i < words; ++i) into[i] = into[i] > from[i] ? into[i] : from[i];
}

void release_clock(Clock& clock, unsigned thread) {
  Block& b = *current_block;
  if (clock.empty()) clock.assign(b.clock_words, 0);
  join(clock.data(), b.clock(thread), b.clock_words);
  b.clock(thread)[thread]++;
}

void acquire_clock(const Clock& clock, unsigned thread) {
  if (!clock.empty()) join(current_block->clock(thread), clock.data(), current_block->clock_words);
}

void meet_clocks(unsigned first_thread, uint32_t lanes) {
  Block& b = *current_block;
  static thread_local Clock met;
  met.assign(b.clock_words, 0);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) join(met.data(), b.clock(first_thread + lane), b.clock_words);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t* clock = b.clock(first_thread + lane);
    std::memcpy(clock, met.data(), met.size() * sizeof(uint32_t));
    clock[first_thread + lane]++;
  }
}

void thread_fence(bool whole_device) {
  if (!whole_device) return;  // within the block it orders nothing that a later barrier would not
  Block& b = *current_block;
  Thread& t = *current_thread;
  b.order.fence(t.fence, uint16_t(t.index), b.clock(t.index), b.clock_words);
  b.clock(t.index)[t.index]++;  // what the thread does from here on, the fence does not cover
}

#else

void release_clock(Clock&, unsigned) {}
void acquire_clock(const Clock&, unsigned) {}
void meet_clocks(unsigned, uint32_t) {}
void thread_fence(bool) {}

#endif

// ---------------------------------------------------------------------------------------------- memory instructions
void copy_unchecked(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void read(void* to, const void* from, size_t bytes, Loc loc) {
  check_access(from, bytes, Access::read, loc, site_of(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes, Loc loc) {
  check_access(to, bytes, Access::write, loc, site_of(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void read_const(void* to, const void* from, size_t bytes, Loc loc) {
  const Site site = site_of(__builtin_return_address(0));
  if (in_smem(from)) KVK_EMU_FAIL("address", "a non-coherent load of shared memory, at " + where(loc));
  check_access(from, bytes, Access::read, loc, site);
  Buffer* buffer = KVK_EMU_RACE ? Buffers::instance().find(from) : nullptr;
  if (buffer) {
    const Shadow::Span span = buffer->shadow.cells(from, bytes);
    for (Cell* cell = span.begin; cell != span.end; ++cell) {
      if (!(cell->flags & Cell::kWritten)) continue;
      KVK_EMU_FAIL("non-coherent-load", who(*current_thread) + " loads at " + place_of(site, loc) +
                                            " through the non-coherent path what this launch wrote at " +
                                            describe(cell->write.site));
    }
  }
  std::memcpy(to, from, bytes);
}

void atomic_access(const void* p, size_t bytes, Loc loc) {
  check_access(p, bytes, Access::atomic, loc, site_of(__builtin_return_address(0)));
  if (!KVK_EMU_RACE || in_smem(p)) return;
  Block& b = *current_block;
  b.order.atomic(current_thread->fence, p, uint16_t(current_thread->index));
}

uint32_t atom_add_acq_rel(uint32_t* p, uint32_t v, Loc loc) {
  thread_fence(true);
  atomic_access(p, sizeof *p, loc);
  const uint32_t old = *p;
  *p = old + v;
  thread_fence(true);
  return old;
}

}  // namespace kvk::emu
