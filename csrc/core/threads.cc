#include "kvk/threads.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace kvk {
namespace {

class Serial final : public Threads {
 public:
  int count() const override { return 1; }
  void run(int workers, void (*task)(void*, int), void* context) override {
    for (int worker = 0; worker < workers; ++worker) task(context, worker);
  }
};

// One job at a time; a caller that finds the pool busy (another thread's call, or a nested one) runs its job alone.
class Pool final : public Threads {
 public:
  Pool() {
    const int n = static_cast<int>(std::thread::hardware_concurrency());
    for (int i = 1; i < n; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Pool() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int count() const override { return static_cast<int>(threads_.size()) + 1; }

  void run(int workers, void (*task)(void*, int), void* context) override {
    std::unique_lock owner(owner_, std::try_to_lock);
    if (!owner || workers <= 1 || threads_.empty()) {
      serial_threads().run(workers, task, context);
      return;
    }
    {
      std::lock_guard lock(mutex_);
      task_ = task;
      context_ = context;
      workers_ = workers;
      next_ = 0;
      pending_ = workers;
    }
    wake_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void serve() {
    while (true) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || next_ < workers_; });
        if (stop_) return;
      }
      work();
    }
  }

  void work() {
    while (true) {
      void (*task)(void*, int);
      void* context;
      int worker;
      {
        std::lock_guard lock(mutex_);
        if (next_ >= workers_) return;
        worker = next_++;
        task = task_;
        context = context_;
      }
      task(context, worker);
      std::lock_guard lock(mutex_);
      if (--pending_ == 0) done_.notify_all();
    }
  }

  std::mutex owner_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  void (*task_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int workers_ = 0;
  int next_ = 0;
  int pending_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

Threads& serial_threads() {
  static Serial threads;
  return threads;
}

Threads& default_threads() {
  static Pool threads;
  return threads;
}

}  // namespace kvk
