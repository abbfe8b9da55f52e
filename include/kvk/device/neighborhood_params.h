// The pattern of neighborhood attention: the window rule of a dimension, and how queries are cut into boxes. The launch code,
// the kernels and the CPU's schedule share the rule.
#pragma once

#include "kvk/device/grid_params.h"

namespace kvk::device {

struct NeighborhoodRun {
  int32_t begin, end;
};

// One dimension. With a dilation of d the positions fall into d groups; all that follows is said of the places within one.
struct NeighborhoodRule {
  int32_t kernel_size, stride;
  bool is_causal;

  // The keys of query i in a group of `length` places (NATTEN's rule). Neither end ever decreases with i.
  KVK_HOST_DEVICE constexpr NeighborhoodRun keys(int32_t i, int32_t length) const {
    const int32_t block = i / stride * stride, last = length - 1, rest = last - block;
    if (is_causal) {
      const int32_t leader = stride - 1 < rest ? block + stride - 1 : last;
      return {leader - kernel_size + 1 > 0 ? leader - kernel_size + 1 : 0, i + 1};
    }
    const int32_t leader = stride / 2 < rest ? block + stride / 2 : last;
    const int32_t from = leader - kernel_size / 2, most = length - kernel_size;
    const int32_t begin = from < 0 ? 0 : from < most ? from : most;
    return {begin, begin + kernel_size};
  }

  // The queries of key `key`: those before `end` begin in time, those from `begin` on end late enough.
  KVK_HOST_DEVICE constexpr NeighborhoodRun queries(int32_t key, int32_t length) const {
    int32_t low = 0, high = length;  // the first query whose keys end behind the key
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (keys(middle, length).end > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int32_t begin = low;
    for (high = length; low < high;) {  // the first whose keys begin behind it
      const int32_t middle = low + (high - low) / 2;
      if (keys(middle, length).begin > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return {begin, low};
  }
};

struct NeighborhoodDimension {
  NeighborhoodRule rule;
  int32_t extent, dilation;
  int32_t tile, boxes;  // places of a box of rows, and boxes of a group

  KVK_HOST_DEVICE constexpr int32_t length(int32_t group) const {
    return extent / dilation + (group < extent % dilation ? 1 : 0);
  }
};

struct NeighborhoodParams {
  NeighborhoodDimension dims[3];
  int64_t boxes;  // of one head and batch: product of dilations and boxes
  int32_t heads,
      parts;  // query heads of a block, and blocks that share the query heads of a kv head; 1 where rows are keys
};

struct Neighborhood {
  using Params = NeighborhoodParams;
  static constexpr int kItemBytes = 112;
  // Places of a box along its dimensions, one after the other.
  KVK_HOST_DEVICE static constexpr int slots(int rows) { return rows + 2; }
  KVK_HOST_DEVICE static constexpr int words(int keys) { return keys < 32 ? 1 : keys / 32; }
  // The item; a run a slot; two stages of words a slot.
  KVK_HOST_DEVICE static constexpr size_t shared_bytes(int rows, int keys) {
    return kItemBytes + round_up<size_t>(slots(rows) * sizeof(NeighborhoodRun), 16) +
           round_up<size_t>(size_t(2) * slots(rows) * words(keys) * sizeof(uint32_t), 16);
  }
  template <class Config>
  class Walk;
};

}  // namespace kvk::device
