// For every key block of a pattern the entries that name it, in the order of their rows: what the gradient of keys and values
// walks over.
//
// Bytes: the lists once for every 32 key blocks, twice; a small part of what the gradient itself reads.
// Tile: a block takes the pattern of one batch and head, a warp 32 key blocks, each lane one of them. A warp reads 32 entries at a
// time and hands round those that are its own, in their order, so that nothing depends on timing.
#pragma once

#include "kvk/device/block_sparse_params.h"
#include "kvk/device/lang.h"

namespace kvk::device {

template <int kThreads>
class BlockTranspose {
 public:
  KVK_DEVICE BlockTranspose(const BlockTransposeParams& p)
      : p_(p), pattern_(p.pattern), b_(blockIdx.x / p.heads), h_(blockIdx.x % p.heads),
        starts_(p.starts + int64_t{blockIdx.x} * (pattern_.block_columns + 1)),
        entries_(p.entries + int64_t{blockIdx.x} * pattern_.num_entries) {
    first_ = clamp(*pattern_.row_ptr.at(b_, h_, 0));
    end_ = clamp(*pattern_.row_ptr.at(b_, h_, pattern_.block_rows));
  }

  KVK_DEVICE void run() {
    for_columns([&](int32_t column) {
      int32_t count = 0;
      for_entries(column, [&](int64_t, int32_t) { ++count; });
      if (column < pattern_.block_columns) starts_[column + 1] = count;
    });
    __syncthreads();  // all counts are there
    if (threadIdx.x < 32) sum_counts();
    __syncthreads();  // all starts are
    for_columns([&](int32_t column) {
      int32_t at = column < pattern_.block_columns ? starts_[column] : 0;
      for_entries(column, [&](int64_t entry, int32_t row) {
        entries_[at++] = {row_of(entry, row), static_cast<int32_t>(entry)};
      });
    });
  }

 private:
  KVK_DEVICE int64_t clamp(int64_t entry) const {
    return entry < 0 ? 0 : entry < pattern_.num_entries ? entry : pattern_.num_entries;
  }

  template <class Call>
  KVK_DEVICE void for_columns(Call&& call) const {
    for (int32_t first = threadIdx.x / 32 * 32; first < pattern_.block_columns; first += kThreads) {
      call(first + static_cast<int32_t>(threadIdx.x % 32));
    }
  }

  // call(entry, the row of it or an earlier one) for the entries that name this lane's column, in their order.
  template <class Call>
  KVK_DEVICE void for_entries(int32_t column, Call&& call) const {
    const int lane = threadIdx.x % 32;
    int32_t row = 0;
    for (int64_t base = first_; base < end_; base += 32) {
      row = row_of(base, row);
      const int32_t named = base + lane < end_ ? *pattern_.col_idx.at(b_, h_, base + lane) : -1;
      uint32_t ours = __ballot_sync(0xffffffffu, named / 32 == column / 32 && named >= 0);
      while (ours != 0) {
        const int from = __ffs(static_cast<int>(ours)) - 1;
        ours &= ours - 1;
        if (__shfl_sync(0xffffffffu, named, from) == column) call(base + from, row);
      }
    }
  }
  // The row of an entry, `row` or a later one.
  KVK_DEVICE int32_t row_of(int64_t entry, int32_t row) const {
    while (row + 1 < pattern_.block_rows && *pattern_.row_ptr.at(b_, h_, row + 1) <= entry) ++row;
    return row;
  }

  // Counts in starts_[1 ..] to starts; one warp.
  KVK_DEVICE void sum_counts() const {
    const int lane = threadIdx.x;
    int32_t before = 0;
    if (lane == 0) starts_[0] = 0;
    for (int32_t first = 0; first < pattern_.block_columns; first += 32) {
      int32_t upto = first + lane < pattern_.block_columns ? starts_[first + lane + 1] : 0;
      KVK_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int32_t below = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += below;
      }
      upto += before;
      if (first + lane < pattern_.block_columns) starts_[first + lane + 1] = upto;
      before = __shfl_sync(0xffffffffu, upto, 31);
    }
  }

  const BlockTransposeParams& p_;
  const BlockSparseParams& pattern_;
  const int32_t b_, h_;
  int32_t* starts_;
  BlockEntry* entries_;
  int64_t first_, end_;
};

template <int kThreads>
KVK_KERNEL(kThreads, 1)
block_transpose_kernel(const __grid_constant__ BlockTransposeParams params) {
  BlockTranspose<kThreads>(params).run();
}

}  // namespace kvk::device
