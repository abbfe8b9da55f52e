// Barriers, and the warp instructions that all lanes named in a mask execute together.
#include <algorithm>

#include "emulator/scheduler.h"

namespace kvk::emu {
namespace {

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::shfl: return "__shfl_sync";
    case Collective::shfl_up: return "__shfl_up_sync";
    case Collective::shfl_down: return "__shfl_down_sync";
    case Collective::shfl_xor: return "__shfl_xor_sync";
    case Collective::ballot: return "__ballot_sync";
    case Collective::any: return "__any_sync";
    case Collective::all: return "__all_sync";
    case Collective::reduce_add: return "__reduce_add_sync";
    case Collective::reduce_min: return "__reduce_min_sync";
    case Collective::reduce_max: return "__reduce_max_sync";
    case Collective::reduce_and: return "__reduce_and_sync";
    case Collective::reduce_or: return "__reduce_or_sync";
    case Collective::reduce_xor: return "__reduce_xor_sync";
    case Collective::match_any: return "__match_any_sync";
    case Collective::syncwarp: return "__syncwarp";
    case Collective::ldmatrix: return "ldmatrix";
    case Collective::mma: return "mma.sync";
  }
  return "a warp instruction";
}

bool needs_all_lanes(Collective kind) { return kind == Collective::ldmatrix || kind == Collective::mma; }

bool is_complete(const Warp& warp, const PendingCollective& c) {
  return ((c.arrived | warp.exited) & c.mask) == c.mask;
}

// Runs a collective whose lanes are all there, and lets them go on.
void finish(Warp& warp, size_t index) {
  Block& b = *current_block;
  const PendingCollective c = warp.pending[index];
  warp.pending.erase(warp.pending.begin() + long(index));
  stats().collectives++;
  const unsigned first_thread = unsigned(&warp - b.warps.data()) * 32;
  if (c.run) c.run(c.argument, c.arrived);
  if (c.kind == Collective::syncwarp) meet_clocks(first_thread, c.arrived);  // the other collectives order no memory
  for (int lane = 31; lane >= 0; --lane) {
    const unsigned thread = first_thread + unsigned(lane);
    if ((c.arrived >> lane & 1) && thread != current_thread->index) make_ready(thread);
  }
}

template <class T>
T& argument_of(void* const* argument, int lane) {
  return *static_cast<T*>(argument[lane]);
}

struct Shuffle {
  uint64_t in, out;
  int source;
  Loc loc;
};
void run_shuffle(void* const* argument, uint32_t arrived) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    auto& mine = argument_of<Shuffle>(argument, lane);
    const int source = mine.source & 31;
    if (!(arrived >> source & 1)) {
      KVK_EMU_FAIL("divergence", "shuffle at " + where(mine.loc) + ": lane " + std::to_string(lane) + " reads lane " +
                                     std::to_string(source) + ", which does not take part");
    }
    mine.out = argument_of<Shuffle>(argument, source).in;
  }
}

struct Vote {
  bool predicate;
  uint32_t out;
};
void run_vote(void* const* argument, uint32_t arrived) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (arrived >> lane & 1) ballot |= uint32_t{argument_of<Vote>(argument, lane).predicate} << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (arrived >> lane & 1) argument_of<Vote>(argument, lane).out = ballot;
  }
}

struct Reduction {
  Collective kind;
  bool is_signed;
  uint32_t value;
};
uint32_t combine(const Reduction& a, uint32_t b) {
  const bool less = a.is_signed ? int32_t(a.value) < int32_t(b) : a.value < b;
  switch (a.kind) {
    case Collective::reduce_min: return less ? a.value : b;
    case Collective::reduce_max: return less ? b : a.value;
    case Collective::reduce_and: return a.value & b;
    case Collective::reduce_or: return a.value | b;
    case Collective::reduce_xor: return a.value ^ b;
    default: return a.value + b;
  }
}
void run_reduction(void* const* argument, uint32_t arrived) {
  Reduction all{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    const auto& mine = argument_of<Reduction>(argument, lane);
    if (first) {
      all = mine;
    } else {
      all.value = combine(all, mine.value);
    }
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (arrived >> lane & 1) argument_of<Reduction>(argument, lane).value = all.value;
  }
}

struct Match {
  uint64_t value;
  uint32_t out;
};
void run_match(void* const* argument, uint32_t arrived) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    auto& mine = argument_of<Match>(argument, lane);
    mine.out = 0;
    for (int other = 0; other < 32; ++other) {
      const bool same = (arrived >> other & 1) && argument_of<Match>(argument, other).value == mine.value;
      mine.out |= uint32_t{same} << other;
    }
  }
}

}  // namespace

void collective(uint32_t mask, Collective kind, Loc loc, void* argument, void (*run)(void* const*, uint32_t)) {
  Thread& t = *current_thread;
  Warp& warp = current_block->warps[t.warp];
  if (!(mask >> t.lane & 1)) {
    KVK_EMU_FAIL("divergence",
                 std::string(name_of(kind)) + " at " + where(loc) + ": " + who(t) + " is not in its own mask");
  }
  size_t index = 0;
  while (index < warp.pending.size() && (warp.pending[index].mask != mask || warp.pending[index].kind != kind)) ++index;
  if (index == warp.pending.size()) warp.pending.push_back({mask, 0, kind, loc, run, {}});
  PendingCollective& c = warp.pending[index];
  if (!same_place(c.loc, loc)) {
    KVK_EMU_FAIL("divergence", std::string(name_of(kind)) + ": " + who(t) + " is at " + where(loc) +
                                   " while other lanes of the warp wait at " + where(c.loc));
  }
  c.arrived |= 1u << t.lane;
  c.argument[t.lane] = argument;
  if (!is_complete(warp, c)) {
    suspend(name_of(kind), loc, mask);
    return;
  }
  if (needs_all_lanes(kind) && c.arrived != 0xffffffffu) {
    KVK_EMU_FAIL("divergence", std::string(name_of(kind)) + " at " + where(loc) + " needs all 32 lanes");
  }
  finish(warp, index);
  maybe_yield();
}

void finish_collectives_at_exit(const Thread& t) {
  Warp& warp = current_block->warps[t.warp];
  for (size_t i = 0; i < warp.pending.size();) {
    const PendingCollective& c = warp.pending[i];
    if (!is_complete(warp, c)) {
      ++i;
      continue;
    }
    if (needs_all_lanes(c.kind)) {
      KVK_EMU_FAIL("divergence",
                   std::string(name_of(c.kind)) + " at " + where(c.loc) + " misses " + who(t) + ", which has exited");
    }
    finish(warp, i);
  }
}

void syncwarp(uint32_t mask, Loc loc) { collective(mask, Collective::syncwarp, loc, nullptr, nullptr); }

uint64_t shuffle(Collective kind, uint32_t mask, uint64_t value, int source, Loc loc) {
  Shuffle s{value, 0, source, loc};
  collective(mask, kind, loc, &s, run_shuffle);
  return s.out;
}

uint32_t vote(Collective kind, uint32_t mask, bool predicate, Loc loc) {
  Vote v{predicate, 0};
  collective(mask, kind, loc, &v, run_vote);
  return v.out;
}

uint32_t reduce(Collective kind, uint32_t mask, uint32_t value, bool is_signed, Loc loc) {
  Reduction r{kind, is_signed, value};
  collective(mask, kind, loc, &r, run_reduction);
  return r.value;
}

uint32_t match_any(uint32_t mask, uint64_t value, Loc loc) {
  Match m{value, 0};
  collective(mask, Collective::match_any, loc, &m, run_match);
  return m.out;
}

// ---------------------------------------------------------------------------------------------- block barriers
int barrier(int id, int threads, bool wait, Loc loc, int predicate) {
  Block& b = *current_block;
  Thread& t = *current_thread;
  if (id < 0 || id > 15)
    KVK_EMU_FAIL("barrier", "barrier " + std::to_string(id) + " at " + where(loc) + ": ids are 0 to 15");
  if (threads % 32)
    KVK_EMU_FAIL("barrier", "barrier " + std::to_string(id) + " at " + where(loc) + ": not whole warps");
  const bool whole_block = threads == 0;
  const int needed = whole_block ? int(b.size) : threads;
  Barrier& bar = b.barriers[id];
  if (bar.arrived == 0) {
    bar.needed = needed;
    bar.predicates = 0;
    bar.arrivals.clear();
    bar.clock.clear();
  }
  if (bar.needed != needed) {
    KVK_EMU_FAIL("barrier", "threads disagree on the count of barrier " + std::to_string(id) + ", at " + where(loc));
  }
  if (whole_block && b.live != b.size) {
    KVK_EMU_FAIL("exit-before-barrier", "__syncthreads at " + where(loc) + " after " + std::to_string(b.size - b.live) +
                                            " threads of the block have exited");
  }
  for (const Barrier::Arrival& other : bar.arrivals) {
    if ((other.warp == int(t.warp) || whole_block) && !same_place(other.loc, loc)) {
      KVK_EMU_FAIL("divergence", "barrier " + std::to_string(id) + ": " + who(t) + " reaches it at " + where(loc) +
                                     " while warp " + std::to_string(other.warp) + " waits at " + where(other.loc));
    }
  }
  if (bar.arrivals.empty() || bar.arrivals.back().warp != int(t.warp)) bar.arrivals.push_back({int(t.warp), loc});
  bar.arrived++;
  bar.predicates += predicate;
  release_clock(bar.clock, t.index);
  if (wait) bar.waiting.push_back(t.index);
  if (bar.arrived < bar.needed) {
    if (!wait) return 0;
    suspend(id ? "a named barrier" : "__syncthreads", loc);
    return bar.result;
  }
  stats().barriers++;
  bar.arrived = 0;
  bar.result = bar.predicates;
  for (size_t i = bar.waiting.size(); i-- > 0;) {
    acquire_clock(bar.clock, bar.waiting[i]);
    if (bar.waiting[i] != t.index) make_ready(bar.waiting[i]);
  }
  bar.waiting.clear();
  const int result = bar.result;
  maybe_yield();
  return result;
}

}  // namespace kvk::emu
