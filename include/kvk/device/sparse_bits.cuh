// Rows of 16-bit elements and their bitmaps in the registers of a warp: 8 neighbouring channels a lane, kLanes lanes a row, as many
// rows side by side as fit.
#pragma once

#include "kvk/device/types.h"

namespace kvk::device {

// Of each byte of x, how many of its bits are set.
KVK_DEVICE uint32_t popc_bytes(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return (x + (x >> 4)) & 0x0f0f0f0fu;
}

// Sums over the lanes of a row before this one. Several numbers may share x, as long as none of these sums leaves its bits.
template <int kLanes>
KVK_DEVICE uint32_t sum_before(uint32_t x) {
  const int unit = static_cast<int>(threadIdx.x) % 32 % kLanes;
  uint32_t sum = x;
  KVK_UNROLL
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, sum, step);
    if (unit >= step) sum += below;
  }
  return sum - x;
}

// 8 elements: the values of number `before` on go where `bits`, a byte with `count` set bits, has them, zeros elsewhere. values lies
// on a multiple of 4 bytes. Up to 12 bytes behind the last of these values may be read.
//
// Two channels become a word at a time: a byte permutation of the lowest word of what is left of the values, and of zero, makes
// (0, 0), (v0, 0), (0, v0) or (v0, v1) of it, and others move what is left down by the values that were taken. The permutations
// themselves are looked up by permutations, each of whose operands is a table of four bytes: two times two nibbles at once.
KVK_DEVICE Words<4> put_apart(const void* values, uint32_t bits, uint32_t count, uint32_t before) {
  const uint32_t odd = before & 1;
  const uint32_t* from = static_cast<const uint32_t*>(values) + before / 2;
  uint32_t w[5] = {};
  KVK_UNROLL
  for (int i = 0; i < 3; ++i) w[i] = load_words<1>(from + i).w[0];
  if (odd + count > 6) {
    w[3] = load_words<1>(from + 3).w[0];
    w[4] = load_words<1>(from + 4).w[0];
  }
  KVK_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = ptx::prmt(w[i], w[i + 1], odd ? 0x5432u : 0x3210u);

  const uint32_t fours = (bits | bits << 12) & 0x000f000fu, pairs = (fours | fours << 6) & 0x03030303u;
  const uint32_t look_up = pairs * 0x11 + 0x40404040u;  // of each pair of bits p the nibbles p and p + 4
  Words<4> out;
  KVK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t apart = ptx::prmt(0x10441044u, 0x32104444u, look_up >> (16 * half));
    const uint32_t down = ptx::prmt(0x54323210u, 0x76545432u, look_up >> (16 * half));
    KVK_UNROLL
    for (int j = 2 * half; j < 2 * half + 2; ++j) {
      out.w[j] = ptx::prmt(w[0], 0, apart >> (j % 2 * 16));
      KVK_UNROLL
      for (int i = 0; i < 3 - j; ++i) w[i] = ptx::prmt(w[i], w[i + 1], down >> (j % 2 * 16));
    }
  }
  return out;
}

}  // namespace kvk::device
