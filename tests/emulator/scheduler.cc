// Launches, and which thread of the block runs next.
#include "emulator/scheduler.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <sstream>
#if KVK_EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kvk::emu {

constinit thread_local Block* current_block = nullptr;
constinit thread_local Thread* current_thread = nullptr;
constinit thread_local bool reporting = false;

namespace {

bool environment_is(const char* name, const char* value) {
  const char* set = std::getenv(name);
  return set && !std::strcmp(set, value);
}

Options options_of_environment() {
  Options o;
  if (environment_is("KVK_EMU_ORDER", "reverse")) o.order = Options::Order::reverse;
  if (environment_is("KVK_EMU_ORDER", "random")) o.order = Options::Order::random;
  if (environment_is("KVK_EMU_ASYNC", "early")) o.async = Options::Async::early;
  if (environment_is("KVK_EMU_ASYNC", "mixed")) o.async = Options::Async::mixed;
  if (const char* seed = std::getenv("KVK_EMU_SEED")) o.seed = std::strtoull(seed, nullptr, 10);
  if (const char* arch = std::getenv("KVK_EMU_ARCH")) o.arch = std::atoi(arch);
  return o;
}

// The next thread to run, or null when none can.
Thread* pick() {
  Block& b = *current_block;
  if (!b.bulk_copies.empty() && options().async == Options::Async::mixed && b.random() % 8 == 0) land_one_bulk_copy();
  while (b.ready.empty()) {
    if (!land_one_bulk_copy()) return nullptr;
  }
  if (options().order == Options::Order::random) std::swap(b.ready[b.random() % b.ready.size()], b.ready.back());
  const unsigned index = b.ready.back();
  b.ready.pop_back();
  return &b.threads[index];
}

void go(Fiber& from, Thread* to, bool from_ends) {
  current_thread = to;
  stats().switches++;
  switch_fiber(from, to->fiber, from_ends);
}

// Who waits where, grouped by place.
std::string deadlock_report() {
  Block& b = *current_block;
  std::map<std::string, std::vector<const Thread*>> groups;
  for (unsigned i = 0; i < b.size; ++i) {
    const Thread& t = b.threads[i];
    if (t.state != Thread::State::waiting) continue;
    std::ostringstream place;
    place << t.waits_in << " at " << where(t.waits_at);
    if (t.waits_mask) place << " mask 0x" << std::hex << t.waits_mask;
    groups[place.str()].push_back(&t);
  }
  std::ostringstream s;
  s << "no thread can run:";
  for (const auto& [place, threads] : groups) {
    s << "\n    " << threads.size() << " threads wait in " << place << ":";
    std::map<unsigned, uint32_t> lanes_of_warp;
    for (const Thread* t : threads) lanes_of_warp[t->warp] |= 1u << t->lane;
    for (const auto& [warp, lanes] : lanes_of_warp)
      s << " warp " << warp << " lanes 0x" << std::hex << lanes << std::dec;
  }
  s << "\n    " << b.size - b.live << " of " << b.size << " threads have exited";
  return s.str();
}

void leave_block(Thread& thread) {
  current_thread = nullptr;
  switch_fiber(thread.fiber, current_block->os_thread, true);
  __builtin_unreachable();
}

void thread_entry() {
  Block& b = *current_block;
  Thread& t = *current_thread;
  fiber_started(b.os_thread);
  b.kernel->call(b.params);
  b.warps[t.warp].exited |= 1u << t.lane;
  check_copies_at_exit(t);
  finish_collectives_at_exit(t);
  t.state = Thread::State::done;
  b.live--;
  const Barrier& block_barrier = b.barriers[0];
  if (block_barrier.arrived) {
    KVK_EMU_FAIL("exit-before-barrier", who(t) + " has exited while " + std::to_string(block_barrier.arrived) +
                                            " threads wait at __syncthreads (" + where(block_barrier.arrivals[0].loc) +
                                            ")");
  }
  Thread* next = b.live ? pick() : nullptr;
  if (b.live && !next) KVK_EMU_FAIL("deadlock", deadlock_report());
  if (next) go(t.fiber, next, true);
  while (land_one_bulk_copy()) {
  }
  leave_block(t);
}

// ---------------------------------------------------------------------------------------------- blocks
void prepare_smem(Block& b) {
  if (!b.smem) {
    void* p = mmap(nullptr, kSmemWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error("emulator", "cannot reserve shared memory");
    b.smem = static_cast<unsigned char*>(p);
  }
  for (const Segment& segment : b.segments) std::memset(b.smem + segment.offset, 0xff, segment.bytes);
}

void check_guards(Block& b) {
  for (const Segment& segment : b.segments) {
    const unsigned char* guard = b.smem + segment.offset + segment.bytes;
#if KVK_EMU_ASAN
    __asan_unpoison_memory_region(guard, kGuardBytes);
#endif
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (guard[i] == 0xff) continue;
      b.error_kind = "shared-out-of-bounds";
      b.error = "byte " + std::to_string(i) + " past the " + std::to_string(segment.bytes) +
                " bytes of the shared object at offset " + std::to_string(segment.offset) + " was overwritten";
      return;
    }
#if KVK_EMU_ASAN
    __asan_poison_memory_region(guard, kGuardBytes);
#endif
  }
}

void prepare_threads(Block& b) {
  const size_t wanted = options().stack_bytes;
  const size_t stack = wanted ? wanted : size_t{KVK_EMU_ASAN ? 256 : 64} << 10;
  for (unsigned i = 0; i < b.size; ++i) {
    Thread& t = b.threads[i];
    t.index = i;
    t.lane = i % 32;
    t.warp = i / 32;
    t.id = {i % b.dim.x, i / b.dim.x % b.dim.y, i / (b.dim.x * b.dim.y)};
    t.state = Thread::State::ready;
    t.copies.clear();
    t.open_group = 0;
    t.proxy_fence_clock = 0;
    t.wgmma_fenced = false;
    t.fence = {};
    b.stacks.prepare(t.fiber, i, stack, thread_entry);
  }
  b.ready.resize(b.size);
  std::iota(b.ready.begin(), b.ready.end(), 0u);
  if (options().order != Options::Order::reverse) std::reverse(b.ready.begin(), b.ready.end());  // taken from the back
}

void prepare_block(Block& b, uint32_t index) {
  static uint32_t epochs = 0;
  b.index = index;
  b.id = {index % b.grid.x, index / b.grid.x % b.grid.y, index / (b.grid.x * b.grid.y)};
  b.epoch = ++epochs;
  b.random.seed(options().seed * 0x9e3779b97f4a7c15ull + index);
  b.live = b.size;
  b.warps.assign((b.size + 31) / 32, Warp{});
  if (b.size % 32) b.warps.back().exited = ~0u << (b.size % 32);
  b.warpgroups.assign((b.size + 127) / 128, Warpgroup{});
  for (Barrier& barrier : b.barriers) barrier = Barrier{};
  b.mbarriers.clear();
  b.bulk_copies.clear();
  b.error_kind.clear();
  b.error.clear();
  if (KVK_EMU_RACE) {
    b.clocks.assign(size_t{b.clock_words} * b.clock_words, 0);
    for (unsigned t = 0; t < b.clock_words; ++t) b.clock(t)[t] = 1;
    b.order.begin_block(index);
  }
  prepare_smem(b);
  prepare_threads(b);
}

void run_block(Block& b, uint32_t index) {
  prepare_block(b, index);
  b.running = true;
  go(b.os_thread, pick(), false);
  b.running = false;
  stats().blocks++;
  stats().threads += b.size;
  if (b.error_kind.empty()) check_guards(b);
  if (b.error_kind.empty()) return;
  std::ostringstream s;
  s << "[emulator:" << b.error_kind << "] " << b.name << " block (" << b.id.x << ',' << b.id.y << ',' << b.id.z
    << "): " << b.error;
  throw Error(b.error_kind, s.str());
}

// ---------------------------------------------------------------------------------------------- launches
void check_config(const Kernel& kernel, const LaunchConfig& c) {
  const auto refuse = [&](const std::string& why) {
    throw Error("launch", "[emulator:launch] " + kernel.name + ": " + why);
  };
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  if (threads == 0 || threads > 1024 || c.block.z > 64) refuse("a block of " + std::to_string(threads) + " threads");
  const bool fits =
      c.grid.x && c.grid.y && c.grid.z && c.grid.x <= 0x7fffffff && c.grid.y <= 65535 && c.grid.z <= 65535;
  if (!fits || uint64_t{c.grid.x} * c.grid.y * c.grid.z > 0xffffffffu) {
    refuse("a grid of " + std::to_string(c.grid.x) + " x " + std::to_string(c.grid.y) + " x " +
           std::to_string(c.grid.z));
  }
  const size_t limit = max_smem_bytes();
  if (c.smem_bytes > limit) {
    refuse(std::to_string(c.smem_bytes) + " bytes of dynamic shared memory, of " + std::to_string(limit));
  }
  if (kernel.params_bytes > sizeof(Block::params)) {
    refuse("parameters of " + std::to_string(kernel.params_bytes) + " bytes, of " +
           std::to_string(sizeof(Block::params)));
  }
}

// The bounds of the loaded binary that holds `code`.
void find_image(const void* code, uintptr_t& begin, uintptr_t& end) {
  struct Query {
    uintptr_t code, begin = 0, end = 0;
  } query{reinterpret_cast<uintptr_t>(code)};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& q = *static_cast<Query*>(data);
        uintptr_t low = UINTPTR_MAX, high = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          low = std::min<uintptr_t>(low, info->dlpi_addr + segment.p_vaddr);
          high = std::max<uintptr_t>(high, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        if (q.code < low || q.code >= high) return 0;
        q.begin = low;
        q.end = high;
        return 1;
      },
      &query);
  begin = query.begin;
  end = query.end;
}

std::vector<uint32_t> block_sequence(uint32_t count) {
  std::vector<uint32_t> sequence(count);
  std::iota(sequence.begin(), sequence.end(), 0u);
  if (options().order == Options::Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (options().order == Options::Order::random) {
    std::mt19937_64 random(options().seed);
    std::shuffle(sequence.begin(), sequence.end(), random);
  }
  return sequence;
}

void prepare_launch(Block& b, const Kernel& kernel, const LaunchConfig& c, const void* params) {
  static uint32_t launches = 0;
  b.name = kernel.name;
  b.kernel = &kernel;
  b.dim = c.block;
  b.grid = c.grid;
  b.size = c.block.x * c.block.y * c.block.z;
  b.clock_words = b.size + kCopyEngines;
  b.threads.resize(std::max<size_t>(b.threads.size(), b.size));
  b.params_bytes = kernel.params_bytes;
  std::memcpy(b.params, params, kernel.params_bytes);
  find_image(reinterpret_cast<const void*>(kernel.call), b.image_begin, b.image_end);
  b.launch_epoch = ++launches;
  b.order.begin_launch();
  b.segments.clear();
  b.dynamic_bytes = c.smem_bytes;
  b.dynamic_used = 0;
  b.top = 1024;  // offset 0 stays out of bounds
#if KVK_EMU_ASAN
  if (b.smem) __asan_poison_memory_region(b.smem, kSmemWindow);
#endif
}

}  // namespace

Options& options() {
  static Options o = options_of_environment();
  return o;
}

size_t max_smem_bytes() {
  const int arch = options().arch;
  if (arch >= 1200) return size_t{99} << 10;
  if (arch >= 900) return size_t{227} << 10;
  return size_t(arch == 800 ? 163 : 99) << 10;
}

Stats& stats() {
  static Stats s{};
  return s;
}

void launch(const Kernel& kernel, const LaunchConfig& config, const void* params) {
  static std::mutex one_at_a_time;
  static Block block;
  const std::lock_guard lock(one_at_a_time);
  check_config(kernel, config);
  prepare_launch(block, kernel, config, params);
  stats().launches++;
  struct Scope {
    explicit Scope(Block& b) {
      current_block = &b;
      reporting = false;
    }
    ~Scope() {
      current_block = nullptr;
      current_thread = nullptr;
    }
  } scope(block);
  block.os_thread = Fiber{};  // the stack of whoever launches
  for (const uint32_t index : block_sequence(config.grid.x * config.grid.y * config.grid.z)) run_block(block, index);
}

// Ends the block from inside one of its threads. The threads' stacks are left as they are, without unwinding: kernels hold
// nothing that wants a destructor, and the emulator's own functions keep nothing across a switch.
void fail(const char* kind, const std::string& message) {
  Block* b = current_block;
  if (!b || !b->running || !current_thread) throw Error(kind, std::string("[emulator:") + kind + "] " + message);
  b->error_kind = kind;
  b->error = message;
  leave_block(*current_thread);
  __builtin_unreachable();
}

void begin_report() { reporting = true; }

Index3 thread_index() { return current_thread->id; }
Index3 block_index() { return current_block->id; }
Dim3 block_dim() { return current_block->dim; }
Dim3 grid_dim() { return current_block->grid; }
unsigned lane_index() { return current_thread->lane; }

bool same_place(Loc a, Loc b) {
  return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
}

std::string where(Loc loc) {
  const char* slash = std::strrchr(loc.file_name(), '/');
  return (slash ? slash + 1 : loc.file_name()) + (":" + std::to_string(loc.line()));
}

std::string who(const Thread& t) {
  std::ostringstream s;
  s << "thread (" << t.id.x << ',' << t.id.y << ',' << t.id.z << ") warp " << t.warp << " lane " << t.lane;
  return s.str();
}

void make_ready(unsigned thread) {
  current_block->threads[thread].state = Thread::State::ready;
  current_block->ready.push_back(thread);
}

void suspend(const char* in, Loc loc, uint32_t mask) {
  Thread& t = *current_thread;
  t.state = Thread::State::waiting;
  t.waits_in = in;
  t.waits_at = loc;
  t.waits_mask = mask;
  Thread* next = pick();
  if (!next) KVK_EMU_FAIL("deadlock", deadlock_report());
  if (next != &t) go(t.fiber, next, false);
  t.state = Thread::State::ready;
}

void maybe_yield() {
  if (options().order != Options::Order::random) return;
  make_ready(current_thread->index);
  suspend("a yield", Loc::current());
}

}  // namespace kvk::emu
