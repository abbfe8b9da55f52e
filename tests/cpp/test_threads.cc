// The thread pool: results do not depend on it, and several callers at once do not disturb each other.
#include <atomic>
#include <thread>

#include "paged_case.h"

namespace {

using namespace test;

Spec long_spec(uint64_t seed) {
  Spec spec{.num_heads = 8, .num_kv_heads = 2, .head_dim = 64, .head_dim_v = 64, .page_size = 16};
  spec.dtype = seed % 2 ? kvk::DType::bf16 : kvk::DType::f32;
  spec.lens = {1500 + static_cast<int64_t>(seed), 3, 700};
  if (seed % 3 == 0) spec.tokens = {20, 1, 50};
  return spec;
}

// Runs its workers one after another and says there are `count` of them.
class Sequential final : public kvk::Threads {
 public:
  Sequential(int count, bool backwards) : count_(count), backwards_(backwards) {}
  int count() const override { return count_; }
  void run(int workers, void (*task)(void*, int), void* context) override {
    for (int i = 0; i < workers; ++i) task(context, backwards_ ? workers - 1 - i : i);
  }

 private:
  int count_;
  bool backwards_;
};

void same_bits_with_any_threads() {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Case problem(long_spec(seed), seed);
    problem.run(kvk::serial_threads());
    const auto want = problem.result();
    for (const int count : {1, 2, 3, 7, 64}) {
      for (const bool backwards : {false, true}) {
        Sequential threads(count, backwards);
        problem.run(threads);
        check(problem.result() == want, "bits differ with " + std::to_string(count) + " workers");
      }
    }
    for (int i = 0; i < 5; ++i) {
      problem.run(kvk::default_threads());
      check(problem.result() == want, "bits differ with the pool");
    }
  }
}

void concurrent_callers() {
  constexpr int kCallers = 4;
  std::vector<std::vector<unsigned char>> want(kCallers);
  std::vector<std::unique_ptr<Case>> problems;
  for (uint64_t i = 0; i < kCallers; ++i) {
    problems.push_back(std::make_unique<Case>(long_spec(i), i));
    problems.back()->run(kvk::serial_threads());
    want[i] = problems.back()->result();
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (size_t i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int round = 0; round < 10; ++round) {
        problems[i]->run();
        if (problems[i]->result() != want[i]) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  check_equal(wrong.load(), 0, "results of concurrent callers that differ");
}

// Every worker runs once, and a task may itself call the pool.
void every_worker_once() {
  kvk::Threads& pool = kvk::default_threads();
  check(pool.count() >= 1, "a pool has a worker");
  check_equal(kvk::serial_threads().count(), 1, "serial workers");
  for (const int workers : {0, 1, 2, 5, 100}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(workers));
    pool.run(
        workers,
        [](void* context, int worker) {
          auto& all = *static_cast<std::vector<std::atomic<int>>*>(context);
          kvk::default_threads().run(
              2, [](void* one, int) { ++*static_cast<std::atomic<int>*>(one); }, &all[static_cast<size_t>(worker)]);
        },
        &runs);
    for (const auto& count : runs) check_equal(count.load(), 2, "runs of a worker of " + std::to_string(workers));
  }
}

}  // namespace

int main() {
  return run([] {
    same_bits_with_any_threads();
    concurrent_callers();
    every_worker_once();
  });
}
