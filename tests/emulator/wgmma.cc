// wgmma: asynchronous matrix products of a warpgroup. A product runs when it is waited for, on what shared memory then
// holds; until then its accumulators read as NaN.
#include <algorithm>
#include <cstring>

#include "emulator/scheduler.h"
#include "emulator/swizzle.h"

namespace kvk::emu {
namespace {

enum Meeting { kIssue = 1, kCommit, kWait, kRegisters };

// All 128 threads come together; true in the last of them, which then calls release.
bool meet(Meeting what, const Wgmma* op, Loc loc) {
  Block& b = *current_block;
  Thread& t = *current_thread;
  const unsigned group = t.index / 128;
  Warpgroup& w = b.warpgroups[group];
  if ((group + 1) * 128 > b.size)
    KVK_EMU_FAIL("wgmma", "the instruction at " + where(loc) + " needs a warpgroup of 128 threads");
  if (w.arrived && (w.meeting != what || !same_place(w.meeting_at, loc))) {
    KVK_EMU_FAIL("divergence", "a warpgroup is split between " + where(w.meeting_at) + " and " + where(loc));
  }
  w.meeting = what;
  w.meeting_at = loc;
  w.ops[t.index % 128] = op;
  if (++w.arrived < 128) {
    suspend("a warpgroup instruction", loc);
    return false;
  }
  w.arrived = 0;
  return true;
}

void release() {
  const unsigned me = current_thread->index, first = me / 128 * 128;
  for (unsigned i = 128; i-- > 0;) {
    if (first + i != me) make_ready(first + i);
  }
  maybe_yield();
}

Warpgroup& my_warpgroup() { return current_block->warpgroups[current_thread->index / 128]; }

// Address of the 16-bit element (mn, k) of an operand behind a shared-memory matrix descriptor.
const uint16_t* element(uint64_t descriptor, uint32_t mn, uint32_t k, bool mn_major) {
  const auto field = [&](int shift) { return uint32_t(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  static constexpr uint32_t kSwizzles[4] = {0, 128, 64, 32};
  const uint32_t swizzle = kSwizzles[descriptor >> 62];
  uint32_t offset;
  if (!mn_major) {
    const uint32_t byte = k * 2;
    offset = mn / 8 * stride;
    offset += swizzle ? mn % 8 * swizzle + byte : mn % 8 * 16 + byte / 16 * leading + byte % 16;
  } else {
    const uint32_t chunk = mn / 8, byte = mn % 8 * 2;
    const uint32_t per_span = swizzle ? swizzle / 16 : 1;
    if (swizzle) {
      offset = chunk % per_span * 16 + chunk / per_span * leading + k % 8 * swizzle + k / 8 * stride + byte;
    } else {
      offset = chunk * stride + k % 8 * 16 + k / 8 * leading + byte;
    }
  }
  return reinterpret_cast<const uint16_t*>(current_block->smem + swizzled(start + offset, swizzle));
}

constexpr int kK = 16;

// Row of the tile that fragment element i of thread t belongs to, for A in registers and for the accumulator.
int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }

void run_product(Warpgroup& w, const WgmmaInFlight& p) {
  static thread_local float a[64][kK], b[256][kK];
  const Wgmma& op = p.op;
  stats().wgmma++;
  const auto load = [&](const uint16_t* at) {
    const unsigned me = current_thread->index;
    check_shared_as(me, KVK_EMU_RACE ? current_block->clock(me) : nullptr, at, 2, Access::read, p.loc, p.site);
    check_async_proxy(at, 2, p.loc, p.site);
    return value_of(*at, op.is_bf16);
  };
  for (uint32_t k = 0; k < kK; ++k) {
    for (uint32_t n = 0; n < uint32_t(op.n); ++n) b[n][k] = load(element(op.desc_b, n, k, op.transpose_b));
    for (uint32_t m = 0; m < 64 && !op.a; ++m) a[m][k] = load(element(op.desc_a, m, k, false));
  }
  for (int t = 0; t < 128 && op.a; ++t) {
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = uint16_t(p.a[t][i / 2] >> (i % 2 * 16));
      a[row_of(t, i)][t % 4 * 2 + i % 2 + i / 4 * 8] = value_of(bits, op.is_bf16);
    }
  }
  std::vector<float>& accumulator = w.accumulators[p.d[0]];
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < op.n / 2; ++i) {
      const int row = row_of(t, i), column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
      float& d = accumulator[size_t(t) * size_t(op.n / 2) + size_t(i)];
      d = (op.accumulate ? d : 0.0f) + sum;
    }
  }
}

void issue(const Wgmma& op, Loc loc, Site site) {
  Warpgroup& w = my_warpgroup();
  static WgmmaInFlight product;  // not a local: fail() leaves without unwinding
  product.op = op;
  product.group = w.open_group;
  product.loc = loc;
  product.site = site;
  for (int t = 0; t < 128; ++t) {
    const Wgmma& theirs = *w.ops[t];
    if (theirs.desc_a != op.desc_a || theirs.desc_b != op.desc_b) {
      KVK_EMU_FAIL("wgmma", "threads of the warpgroup pass different descriptors, at " + where(loc));
    }
    product.d[t] = theirs.d;
    if (op.a) std::memcpy(product.a[t], theirs.a, sizeof product.a[t]);
  }
  const size_t count = size_t(op.n / 2);
  std::vector<float>& accumulator = w.accumulators[product.d[0]];
  if (accumulator.empty()) {
    for (float* d : product.d) {
      accumulator.insert(accumulator.end(), d, d + count);
      if (options().async != Options::Async::early) std::memset(d, 0xff, count * sizeof(float));
    }
  }
  w.in_flight.push_back(product);
}

void finish(int pending) {
  Warpgroup& w = my_warpgroup();
  size_t done = 0;
  for (; done < w.in_flight.size() && w.in_flight[done].group + uint32_t(pending) < w.open_group; ++done) {
    run_product(w, w.in_flight[done]);
  }
  for (size_t i = 0; i < done; ++i) {
    const WgmmaInFlight& product = w.in_flight[i];
    const auto accumulator = w.accumulators.find(product.d[0]);
    if (accumulator == w.accumulators.end()) continue;
    const bool still_used = std::any_of(w.in_flight.begin() + long(done), w.in_flight.end(),
                                        [&](const WgmmaInFlight& other) { return other.d[0] == product.d[0]; });
    if (still_used) continue;
    const size_t count = size_t(product.op.n / 2);
    for (size_t t = 0; t < 128; ++t) std::memcpy(product.d[t], &accumulator->second[t * count], count * sizeof(float));
    w.accumulators.erase(accumulator);
  }
  w.in_flight.erase(w.in_flight.begin(), w.in_flight.begin() + long(done));
}

}  // namespace

void wgmma_fence() { current_thread->wgmma_fenced = true; }

void wgmma(const Wgmma& op, Loc loc) {
  if (!current_thread->wgmma_fenced) {
    KVK_EMU_FAIL("wgmma-fence", "wgmma without wgmma.fence since the last wait, at " + where(loc));
  }
  if (!meet(kIssue, &op, loc)) return;
  issue(op, loc, site_of(__builtin_return_address(0)));
  release();
}

void wgmma_commit(Loc loc) {
  if (!meet(kCommit, nullptr, loc)) return;
  my_warpgroup().open_group++;
  release();
}

void wgmma_wait(int pending, Loc loc) {
  current_thread->wgmma_fenced = false;
  if (!meet(kWait, nullptr, loc)) return;
  finish(pending);
  release();
}

// Only that the whole warpgroup executes it.
void set_max_registers(Loc loc) {
  if (meet(kRegisters, nullptr, loc)) release();
}

}  // namespace kvk::emu
