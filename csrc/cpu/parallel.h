// Loops over work on the caller's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/explain.h"
#include "kvk/threads.h"

namespace kvk::cpu {

// f(worker, i) for every i in [0, n); workers take the next i when they are free, so uneven work is balanced.
template <class F>
void parallel_items(Threads& threads, int workers, int64_t n, const F& f) {
  struct Context {
    const F& f;
    int64_t n;
    std::atomic<int64_t> next{0};
  } context{f, n};
  const auto task = [](void* opaque, int worker) {
    Context& c = *static_cast<Context*>(opaque);
    for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) c.f(worker, i);
  };
  workers = static_cast<int>(std::min<int64_t>(workers, n));
  if (explain::notes() != nullptr) return explain_loop(*explain::notes(), n, std::max(1, workers));
  if (workers <= 1) {
    for (int64_t i = 0; i < n; ++i) f(0, i);
  } else {
    threads.run(workers, task, &context);
  }
}

// f(begin, end) over [0, n) in pieces of at least `grain`.
template <class F>
void parallel_ranges(Threads& threads, int64_t n, int64_t grain, const F& f) {
  const int64_t pieces =
      std::max<int64_t>(1, std::min<int64_t>(threads.count() * int64_t{4}, n / std::max<int64_t>(1, grain)));
  if (n == 0) return;
  if (pieces == 1 && explain::notes() == nullptr) return f(int64_t{0}, n);
  parallel_items(threads, threads.count(), pieces, [&](int, int64_t i) { f(n * i / pieces, n * (i + 1) / pieces); });
}

}  // namespace kvk::cpu
