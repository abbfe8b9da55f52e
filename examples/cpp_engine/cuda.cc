// The decode loop of main.cc on a card: its arrays lie there, and all work is queued on a stream of this program's own.
//
// kvk itself opens the driver and NVRTC at run time; the CUDA runtime is here for the program's memory and its stream.
#include <cuda_runtime_api.h>
#include <kvk/kvk.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "loop.h"

using engine::kSetup;

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The program's stream. Not the default one: kvk is told which.
cudaStream_t stream() {
  static cudaStream_t made = [] {
    cudaStream_t s = nullptr;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return s;
  }();
  return made;
}

template <class T>
class CardArray {
 public:
  CardArray(const std::vector<T>& values, bool) : count_(values.size()) {
    if (count_ == 0) return;
    check(cudaMallocAsync(reinterpret_cast<void**>(&data_), count_ * sizeof(T), stream()), "cudaMallocAsync");
    check(cudaMemcpyAsync(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice, stream()), "to the card");
  }
  ~CardArray() {
    if (data_ != nullptr) cudaFreeAsync(data_, stream());  // when the stream has come here
  }
  CardArray(const CardArray&) = delete;
  CardArray& operator=(const CardArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    check(cudaMemcpyAsync(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream()), "from the card");
    check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// Partial results of long requests. They go when the program ends; an engine frees them after each step, in the stream's order.
class StreamAllocator final : public kvk::Allocator {
 public:
  ~StreamAllocator() override {
    for (void* block : blocks_) cudaFreeAsync(block, stream());
  }
  void* allocate(kvk::Device, int64_t bytes) override {
    blocks_.emplace_back();
    check(cudaMallocAsync(&blocks_.back(), static_cast<size_t>(bytes), stream()), "cudaMallocAsync");
    return blocks_.back();
  }

 private:
  std::vector<void*> blocks_;
};

}  // namespace

int main() try {
  int cards = 0;
  if (cudaGetDeviceCount(&cards) != cudaSuccess || cards == 0) {
    std::fprintf(stderr, "engine_cuda: no CUDA card here\n");
    return 77;
  }
  StreamAllocator allocator;
  kvk::Context context;
  context.cuda_stream = stream();
  context.allocator = &allocator;
  const kvk::Device card = {kvk::DeviceType::cuda, 0};
  const double worst = engine::decode_loop<engine::BFloat16, CardArray>(kSetup, card, context);
  std::printf("%d steps of %d requests on cuda:0: %.1f bits an element in full pages, largest error %.1e\n",
              kSetup.num_steps, kSetup.num_requests, engine::bits_per_element(kSetup.format), worst);
  return worst < 1.5e-2 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "engine_cuda: %s\n", error.what());
  return 1;
}
