// The block that runs: its threads, warps, barriers and shared memory. For the emulator's own files.
#pragma once

#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/blocks.h"
#include "emulator/checker.h"
#include "emulator/emulator.h"
#include "emulator/fiber.h"
#include "emulator/instructions.h"

namespace kvk::emu {

// An issued cp.async.
struct CpAsync {
  unsigned char* dst;
  const unsigned char* src;
  uint32_t bytes, src_bytes;
  uint32_t group;
  bool landed;
  Loc loc;
  Site site;
};

struct Thread {
  enum class State : uint8_t { ready, waiting, done };
  unsigned index = 0, lane = 0, warp = 0;
  Index3 id = {};
  Fiber fiber;
  State state = State::ready;
  const char* waits_in = "";
  Loc waits_at;
  uint32_t waits_mask = 0;
  std::vector<CpAsync> copies;
  uint32_t open_group = 0;
  uint32_t proxy_fence_clock = 0;  // step of the latest fence between the memory proxies
  bool wgmma_fenced = false;       // wgmma.fence executed since the latest wgmma.wait
  FenceState fence;
};

// A warp instruction that waits for the rest of its lanes.
struct PendingCollective {
  uint32_t mask, arrived;
  Collective kind;
  Loc loc;
  void (*run)(void* const* argument, uint32_t arrived);
  void* argument[32];
};

struct Warp {
  std::vector<PendingCollective> pending;
  uint32_t exited = 0;
};

struct Barrier {
  struct Arrival {
    int warp;
    Loc loc;
  };
  int needed = 0, arrived = 0, predicates = 0, result = 0;
  std::vector<unsigned> waiting;
  std::vector<Arrival> arrivals;
  Clock clock;
};

struct MBarrier {
  uint32_t count, pending, phase;
  uint32_t init_thread, init_clock;
  int64_t tx_bytes;
  std::vector<unsigned> waiting;
  Clock arriving, completed;  // what this phase's arrivals, and the last completed phase's, make visible
};

// A bulk copy on its way.
struct BulkCopy {
  unsigned char* dst;
  const unsigned char* src;  // null: a tensor copy, by `map`
  TensorMapContents map;
  uint64_t* bar;
  int at[5];
  uint32_t bytes;
  Clock clock;
  unsigned thread;
  Loc loc;
  Site site;
};

struct WgmmaInFlight {
  Wgmma op;
  float* d[128];
  uint32_t a[128][4];
  uint32_t group;
  Loc loc;
  Site site;
};

// What the 128 threads of a warpgroup do together.
struct Warpgroup {
  std::vector<WgmmaInFlight> in_flight;
  uint32_t open_group = 0;
  std::map<float*, std::vector<float>> accumulators;  // by the address of thread 0's, while products are in flight
  uint32_t arrived = 0;
  int meeting = 0;
  Loc meeting_at;
  const Wgmma* ops[128];
};

// A part of shared memory; the same one in all blocks of a launch.
struct Segment {
  const void* key;  // of a static object; null for a carved part
  uint32_t index;   // of a carved part
  size_t offset, bytes;
  Shadow shadow;
};

struct Block {
  // ---- the launch
  std::string name;
  Dim3 dim, grid;
  const Kernel* kernel = nullptr;
  alignas(64) unsigned char params[4096];
  size_t params_bytes = 0;
  uintptr_t image_begin = 0, image_end = 0;  // of the binary that holds the kernel, whose constants it may read
  uint32_t launch_epoch = 0;
  BlockOrder order;
  // ---- this block
  Index3 id = {};
  uint32_t index = 0, epoch = 0;  // epoch: never the same twice
  unsigned size = 0, live = 0;
  bool running = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[16];
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  std::vector<unsigned> ready;
  std::mt19937_64 random;
  Fiber os_thread;
  FiberStacks stacks;
  std::string error_kind, error;
  // ---- shared memory
  unsigned char* smem = nullptr;
  size_t dynamic_bytes = 0, dynamic_used = 0, top = 0;
  std::vector<Segment> segments;
  // ---- vector clocks, clock_words of them a thread
  std::vector<uint32_t> clocks;
  unsigned clock_words = 0;

  uint32_t* clock(unsigned thread) { return &clocks[size_t{thread} * clock_words]; }
};

// Larger than any card's, for the guard zones, and within the 18 bits of a wgmma descriptor.
constexpr size_t kSmemWindow = size_t{256} << 10;
constexpr size_t kGuardBytes = 64;

extern constinit thread_local Block* current_block;
extern constinit thread_local Thread* current_thread;
extern constinit thread_local bool reporting;  // since begin_report, until the next launch

inline bool in_smem(const void* p) {
  return current_block &&
         reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(current_block->smem) < kSmemWindow;
}
Segment* segment_of(const void* p, size_t bytes);  // null unless the bytes lie in one part

std::string where(Loc loc);
std::string who(const Thread& thread);
bool same_place(Loc a, Loc b);

// The current thread waits until make_ready is called for it.
void suspend(const char* in, Loc loc, uint32_t mask = 0);
void make_ready(unsigned thread);
// Under a random schedule the thread that completes a barrier need not be the one that runs on.
void maybe_yield();

// Waits until all lanes of the mask have come to this place with their arguments (by lane); then one of them calls `run`.
void collective(uint32_t mask, Collective kind, Loc loc, void* argument, void (*run)(void* const*, uint32_t arrived));

// What other files add to a thread's exit and to the end of a block.
void check_copies_at_exit(const Thread& thread);
void finish_collectives_at_exit(const Thread& thread);
bool land_one_bulk_copy();  // false: none was on its way

// Vector clocks (access.cc): what `thread` has done so far goes into `clock`, or comes from it. Nothing in builds that do
// not check.
void release_clock(Clock& clock, unsigned thread);
void acquire_clock(const Clock& clock, unsigned thread);
void meet_clocks(unsigned first_thread, uint32_t lanes);  // __syncwarp

// Accesses that emulated instructions make (access.cc): bounds and alignment always, races where the build checks them.
void check_access(const void* p, size_t bytes, Access access, Loc loc, Site site);
// The same for a thread other than the running one: a lane of ldmatrix, or a copy engine.
void check_shared_as(unsigned thread, const uint32_t* clock, const void* p, size_t bytes, Access access, Loc loc,
                     Site site);
void check_global_as(unsigned thread, const uint32_t* clock, const void* p, size_t bytes, Access access, Loc loc,
                     Site site);
void check_async_proxy(const void* p, size_t bytes, Loc loc, Site site);

}  // namespace kvk::emu
