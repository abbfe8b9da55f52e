// Stands in for LibTorch's header of this name: new arrays come from the library of `like`, threads from kvk.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace torch::stable {

// Of the array library that `like` is from, on its device, contiguous (csrc/array/module.cc).
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape,
                 std::optional<headeronly::ScalarType> dtype = std::nullopt);

uint32_t get_num_threads();

namespace detail {
void run_parallel(int64_t begin, int64_t end, void (*task)(const void* f, int64_t begin, int64_t end), const void* f);
}

// f(begin, end) over pieces of one each, on kvk's threads.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  detail::run_parallel(
      begin, end, [](const void* opaque, int64_t b, int64_t e) { (*static_cast<const F*>(opaque))(b, e); }, &f);
}

}  // namespace torch::stable
