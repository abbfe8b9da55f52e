// The one interface through which kvk gets its threads: the host program owns them.
#pragma once

#include "kvk/api.h"

namespace kvk {

class KVK_API Threads {
 public:
  virtual ~Threads() = default;

  // The most workers that run() will use; >= 1.
  virtual int count() const = 0;

  // Calls task(context, worker) once for each worker in [0, workers), on any threads and in any order, and returns
  // when all are done. task does not throw. Results never depend on how many run at once.
  virtual void run(int workers, void (*task)(void* context, int worker), void* context) = 0;
};

// The calling thread alone.
KVK_API Threads& serial_threads();

// A pool of std::threads, one per hardware thread, started at first use and shared by the process.
KVK_API Threads& default_threads();

}  // namespace kvk
