// How linear attention, with decay or normalised, is cut for the threads: heads of sequences, columns of v, scratch memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/explain.h"
#include "cpu/lightning_plan.h"
#include "cpu/memory.h"
#include "kvk/threads.h"
#include "kvk/types.h"

namespace kvk::cpu {

// Scratch of all workers, `floats` each: zeros at first.
class Scratch {
 public:
  Scratch(int64_t floats, int workers) : floats_((floats + 15) / 16 * 16) {
    const int64_t bytes = floats_ * workers * int64_t{sizeof(float)};
    memory_ = allocate(bytes);
    std::memset(memory_.get(), 0, static_cast<size_t>(bytes));
  }
  float* of(int worker) const { return reinterpret_cast<float*>(memory_.get()) + worker * floats_; }

 private:
  int64_t floats_;
  Buffer memory_;
};

// Every head of every sequence, its columns of v in `slices` pieces; the longest sequences first.
inline std::vector<LightningItem> items_of(const Tensor& q, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
                                           int slices) {
  const int64_t sequences = cu_seqlens ? cu_seqlens->shape[0] - 1 : q.shape[0], heads = q.shape[2];
  const int64_t panels = (v.shape[3] + kLightningColumns - 1) / kLightningColumns;
  std::vector<LightningItem> items;
  items.reserve(static_cast<size_t>(sequences * heads * slices));
  for (int64_t n = 0; n < sequences; ++n) {
    const auto start = [&](int64_t i) { return int64_t{cu_seqlens->ptr<const int32_t>()[i * cu_seqlens->stride[0]]}; };
    const int64_t first = cu_seqlens ? start(n) : 0, end = cu_seqlens ? start(n + 1) : q.shape[1];
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t s = 0; s < slices; ++s) {
        const int64_t begin = panels * s / slices * kLightningColumns;
        const int64_t stop = std::min(v.shape[3], panels * (s + 1) / slices * kLightningColumns);
        items.push_back(
            {n, cu_seqlens ? 0 : n, first, end - first, h, static_cast<int32_t>(begin), static_cast<int32_t>(stop)});
      }
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const LightningItem& a, const LightningItem& b) { return a.num_tokens > b.num_tokens; });
  return items;
}

// A worker wants two items or more, so that none waits long at the end. Slices repeat the scores: no more than needed.
inline int slices_for(int64_t items, int workers, int64_t dv) {
  const int64_t panels = (dv + kLightningColumns - 1) / kLightningColumns;
  if (items == 0 || workers == 1) return 1;
  const int64_t wanted = (2 * workers + items - 1) / items;
  return static_cast<int>(std::clamp<int64_t>(items % workers == 0 ? workers / items : wanted, 1, panels));
}

// The tokens behind the last sequence belong to none: their rows of x are 0.
inline void clear_unowned(const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return;
  const int64_t last = cu_seqlens->shape[0] - 1, size = element_size(x.dtype);
  const int64_t row = x.ndim == 4 ? x.shape[3] : 1;
  for (int64_t t = cu_seqlens->ptr<const int32_t>()[last * cu_seqlens->stride[0]]; t < x.shape[1]; ++t) {
    for (int64_t h = 0; h < x.shape[2]; ++h) {
      std::memset(x.ptr<char>() + (t * x.stride[1] + h * x.stride[2]) * size, 0, static_cast<size_t>(row * size));
    }
  }
}

// Multiply-adds below which a second thread costs more than it brings.
inline constexpr int64_t kSerialWork = 200'000;

inline int workers_for(const Tensor& q, const Tensor& v, Threads& threads) {
  const int64_t work = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * v.shape[3];
  return work < kSerialWork ? 1 : threads.count();
}

// Whether the call is only explained, which this does.
inline bool explained(const std::vector<LightningItem>& items, int slices, int64_t scratch_floats, int workers) {
  explain::Notes* notes = explain::notes();
  if (notes == nullptr) return false;
  const auto count = static_cast<int64_t>(items.size());
  workers = static_cast<int>(std::clamp<int64_t>(count, 1, workers));
  explain_chunks(*notes, count, slices, kLightningChunk, scratch_floats * int64_t{sizeof(float)}, workers);
  return true;
}

}  // namespace kvk::cpu
