// The ceilings of the machine: read, copy and triad bandwidth and the fp32 FMA rate.
//
// roofline.py compiles this file on first use with -O3 -march=native and calls it through ctypes. It is a
// measuring instrument and shares no code with the library. Each function runs one pass on `threads` threads
// of its own and returns the seconds between the common start and the end of the slowest thread. Variants of
// one ceiling differ in how they walk memory; the caller keeps the best.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 16;  // 32 registers: enough independent chains to hide 4 cycles at 2 FMA a cycle
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // 16 registers, two of them hold the factors
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif
constexpr std::size_t kLanes = kVectorBytes / sizeof(float);

typedef float Vec __attribute__((vector_size(kVectorBytes)));

std::atomic<float> g_sink{0.0f};  // results end here, so that no pass is dead code

void keep(Vec v) {
  float sum = 0.0f;
  for (std::size_t i = 0; i < kLanes; ++i) sum += v[i];
  g_sink.store(sum, std::memory_order_relaxed);
}

Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }

void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// A store that does not first read the line into the cache, where the machine has one.
void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}

void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Runs work(thread) on every thread at once; the caller is thread 0. Seconds from start to the last end.
template <class Work>
double timed(int threads, Work work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] {
      waiting.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      work(t);
    });
  }
  while (waiting.load() != threads - 1) {
  }
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Slice {
  std::size_t begin, end;  // in floats, multiples of `unit`
};

Slice slice(std::size_t floats, int threads, int t, std::size_t unit) {
  const std::size_t units = floats / unit;
  return {units * t / threads * unit, units * (t + 1) / threads * unit};
}

// One thread sums p[0, floats) as `Streams` interleaved walks with two accumulators each.
template <int Streams, int PrefetchBytes>
void read_slice(const float* p, std::size_t floats) {
  constexpr std::size_t step = 4 * kLanes;
  const std::size_t part = floats / Streams / step * step;
  Vec acc[Streams][2] = {};
  for (std::size_t i = 0; i < part; i += step) {
    for (int s = 0; s < Streams; ++s) {
      const float* at = p + s * part + i;
      if constexpr (PrefetchBytes > 0) {
        for (std::size_t line = 0; line < step * sizeof(float); line += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(at) + PrefetchBytes + line);
        }
      }
      acc[s][0] += load(at) + load(at + kLanes);
      acc[s][1] += load(at + 2 * kLanes) + load(at + 3 * kLanes);
    }
  }
  Vec total = {};
  for (int s = 0; s < Streams; ++s) total += acc[s][0] + acc[s][1];
  keep(total);
}

template <int Streams, int PrefetchBytes>
double read_pass(const float* p, std::size_t floats, int threads) {
  return timed(threads, [&](int t) {
    const Slice part = slice(floats, threads, t, 16 * kLanes);
    read_slice<Streams, PrefetchBytes>(p + part.begin, part.end - part.begin);
  });
}

template <bool NonTemporal>
void put(float* p, Vec v) {
  if constexpr (NonTemporal) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

template <bool NonTemporal>
double copy_pass(float* to, const float* from, std::size_t floats, int threads) {
  return timed(threads, [&](int t) {
    const Slice part = slice(floats, threads, t, 4 * kLanes);
    for (std::size_t i = part.begin; i < part.end; i += 4 * kLanes) {
      for (std::size_t j = 0; j < 4 * kLanes; j += kLanes) put<NonTemporal>(to + i + j, load(from + i + j));
    }
    stream_fence();
  });
}

template <bool NonTemporal>
double triad_pass(float* a, const float* b, const float* c, std::size_t floats, int threads) {
  return timed(threads, [&](int t) {
    const Slice part = slice(floats, threads, t, 4 * kLanes);
    for (std::size_t i = part.begin; i < part.end; i += 4 * kLanes) {
      for (std::size_t j = 0; j < 4 * kLanes; j += kLanes) {
        put<NonTemporal>(a + i + j, load(b + i + j) + 1.5f * load(c + i + j));
      }
    }
    stream_fence();
  });
}

}  // namespace

extern "C" {

int kvk_bench_vector_bytes() { return kVectorBytes; }

int kvk_bench_read_variants() { return 4; }

// data: `bytes` bytes, 64-byte aligned. Moves `bytes`.
double kvk_bench_read(const float* data, std::size_t bytes, int threads, int variant) {
  const std::size_t floats = bytes / sizeof(float);
  switch (variant) {
    case 0: return read_pass<1, 0>(data, floats, threads);
    case 1: return read_pass<1, 4096>(data, floats, threads);
    case 2: return read_pass<4, 0>(data, floats, threads);
    case 3: return read_pass<4, 2048>(data, floats, threads);
    default: return -1.0;
  }
}

int kvk_bench_copy_variants() { return 3; }

// Moves 2 * bytes (read + write; the read of a line before it is written is not counted).
double kvk_bench_copy(float* to, const float* from, std::size_t bytes, int threads, int variant) {
  const std::size_t floats = bytes / sizeof(float);
  switch (variant) {
    case 0: return copy_pass<false>(to, from, floats, threads);
    case 1: return copy_pass<true>(to, from, floats, threads);
    case 2:
      return timed(threads, [&](int t) {
        const Slice part = slice(floats, threads, t, kLanes);
        std::memcpy(to + part.begin, from + part.begin, (part.end - part.begin) * sizeof(float));
      });
    default: return -1.0;
  }
}

int kvk_bench_triad_variants() { return 2; }

// a = b + 1.5 c. Moves 3 * bytes.
double kvk_bench_triad(float* a, const float* b, const float* c, std::size_t bytes, int threads, int variant) {
  const std::size_t floats = bytes / sizeof(float);
  switch (variant) {
    case 0: return triad_pass<false>(a, b, c, floats, threads);
    case 1: return triad_pass<true>(a, b, c, floats, threads);
    default: return -1.0;
  }
}

// FLOPs of one call of kvk_bench_fma.
double kvk_bench_fma_flops(std::int64_t iterations, int threads) {
  return 2.0 * kAccumulators * kLanes * static_cast<double>(iterations) * threads;
}

// Independent multiply-add chains in registers.
double kvk_bench_fma(std::int64_t iterations, int threads) {
  return timed(threads, [&](int t) {
    Vec acc[kAccumulators];
    Vec x, y;
    for (std::size_t i = 0; i < kLanes; ++i) {
      x[i] = 0.999f + 1e-6f * static_cast<float>(t);  // converges to y / (1 - x): no overflow, no denormals
      y[i] = 1e-3f;
    }
    for (int a = 0; a < kAccumulators; ++a) acc[a] = x + static_cast<float>(a);
    for (std::int64_t n = 0; n < iterations; ++n) {
      for (int a = 0; a < kAccumulators; ++a) acc[a] = acc[a] * x + y;
    }
    Vec total = {};
    for (int a = 0; a < kAccumulators; ++a) total += acc[a];
    keep(total);
  });
}

}  // extern "C"
