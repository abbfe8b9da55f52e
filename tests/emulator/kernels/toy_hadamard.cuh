// Walsh-Hadamard transform of rows of 128, one warp a row, for the mutation test of the emulator: not the library's kernel.
#pragma once

#include "kvk/device/types.h"

namespace kvk::device {

struct ToyHadamardParams {
  const bf16* in;  // [rows, 128]
  bf16* out;       // [rows, 128]
  int32_t rows;
  float scale;
  int32_t defect;  // 0: none
};

template <class T>
KVK_KERNEL(128)
toy_hadamard_kernel(const __grid_constant__ ToyHadamardParams p) {
  const int lane = threadIdx.x & 31, row = int(blockIdx.x * 4 + (threadIdx.x >> 5));
  if (row >= p.rows) return;                             // whole warps, so the shuffles stay full
  if (p.defect == 30 && lane == 31 && row == 0) return;  // 30: a lane leaves before the shuffles
  const Words<2> words = load_words<2>(p.in + int64_t{row} * 128 + lane * 4);
  const float2 ab = unpack2<T>(words.w[0]), cd = unpack2<T>(words.w[1]);
  const float s0 = ab.x + ab.y, s1 = ab.x - ab.y, s2 = cd.x + cd.y, s3 = cd.x - cd.y;
  float v[4] = {s0 + s2, s1 + s3, s0 - s2, s1 - s3};
  KVK_UNROLL
  for (int m = 1; m < 32; m <<= 1) {
    if (p.defect == 31) {  // 31: the shuffle sits in both arms of a branch
      if (lane & m) {
        for (int i = 0; i < 4; i++) v[i] = __shfl_xor_sync(0xffffffffu, v[i], m) - v[i];
      } else {
        for (int i = 0; i < 4; i++) v[i] = __shfl_xor_sync(0xffffffffu, v[i], m) + v[i];
      }
      continue;
    }
    KVK_UNROLL
    for (int i = 0; i < 4; i++) {
      const float other = __shfl_xor_sync(0xffffffffu, v[i], m);
      v[i] = (lane & m) ? other - v[i] : v[i] + other;
    }
  }
  const Words<2> result = {{pack2<T>(v[0] * p.scale, v[1] * p.scale), pack2<T>(v[2] * p.scale, v[3] * p.scale)}};
  store_words(p.out + int64_t{row} * 128 + lane * 4, result);
}

}  // namespace kvk::device
