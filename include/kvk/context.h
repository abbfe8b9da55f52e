// What a call needs of its host beside its arguments: threads on the CPU, a stream and memory on a card.
#pragma once

#include <cstdint>

#include "kvk/threads.h"
#include "kvk/types.h"

namespace kvk {

// Device memory for the time of a call.
class KVK_API Allocator {
 public:
  virtual ~Allocator() = default;
  // `bytes` on `device`, on a multiple of 256, that stay valid until all work queued on the context's stream is done.
  virtual void* allocate(Device device, int64_t bytes) = 0;
};

struct Context {
  Threads* threads = nullptr;      // CPU; null: default_threads()
  void* cuda_stream = nullptr;     // CUDA: a CUstream of the tensors' card; null: its default stream
  Allocator* allocator = nullptr;  // CUDA: where partial results go, and with KVK_CHECK=1 what a check finds

  Context() = default;
  Context(Threads& with) : threads(&with) {}  // a call on the CPU may name its threads alone
};

}  // namespace kvk
