// Which of many owners a block works for, where the card alone knows how many blocks each needs.
#pragma once

#include "kvk/device/lang.h"

namespace kvk::device {

// Slot number `index` of the `count` that owner `owner` has.
struct Slot {
  int32_t owner;
  int64_t index, count;
};

// Owner i of num_owners has slots(i) of the slots from 0 on. Every warp works it out for itself. False past the last slot.
template <class Slots>
KVK_DEVICE bool find_slot(int64_t slot, int32_t num_owners, Slots&& slots, Slot& found) {
  const int lane = threadIdx.x % 32;
  for (int32_t first = 0; first < num_owners; first += 32) {
    const int64_t mine = first + lane < num_owners ? slots(first + lane) : 0;
    int64_t upto = mine;  // slots of the owners from `first` on, to this lane's
    KVK_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += below;
    }
    const uint32_t at = __ballot_sync(0xffffffffu, slot < upto);
    if (at != 0) {
      const int owner = __ffs(static_cast<int>(at)) - 1;
      found.owner = first + owner;
      found.count = __shfl_sync(0xffffffffu, mine, owner);
      found.index = slot - (__shfl_sync(0xffffffffu, upto, owner) - found.count);
      return true;
    }
    slot -= __shfl_sync(0xffffffffu, upto, 31);
  }
  return false;
}

}  // namespace kvk::device
