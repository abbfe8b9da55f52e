// A small split-KV decode attention, for the mutation test of the emulator (mutation.py): not the library's kernel. It uses
// what the library's kernels use, and `defect` seeds one of 15 mistakes.
//
// One block takes one (request, kv head, split); four warps; a tile is 64 tokens, 16 a warp; cp.async double buffering.
#pragma once

#include "kvk/device/ptx.h"
#include "kvk/device/smem.h"
#include "kvk/device/types.h"

namespace kvk::device {

struct ToyDecodeParams {
  const bf16* q;         // [B, Hkv * kGroup, D]
  const bf16* k;         // [pages, kPage, Hkv, D]
  const bf16* v;         // like k
  const int32_t* table;  // [B, max_pages]
  const int32_t* lens;   // [B]
  float* part_out;       // [B, Hq, splits, D]
  float* part_state;     // [B, Hq, splits, 2]: maximum, sum
  int32_t num_kv_heads, max_pages, splits;
  float scale_log2;
  int32_t defect;  // 0: none
};

struct ToyDecodeConfig {
  static constexpr int kDim = 128, kPage = 16, kGroup = 4;
  static constexpr int kTile = 64, kStages = 2, kWarps = 4, kThreads = kWarps * 32;
  static constexpr size_t kSmemBytes = SmemBytes()
                                           .add<bf16>(kStages * kTile * kDim, 128)
                                           .add<bf16>(kStages * kTile * kDim, 128)
                                           .add<bf16>(16 * kDim, 128)
                                           .add<float>(kWarps * kGroup * kDim)
                                           .add<float>(kWarps * kGroup * 2)
                                           .total;
};

template <class Config>
KVK_KERNEL(Config::kThreads)
toy_decode_kernel(const __grid_constant__ ToyDecodeParams p) {
  constexpr int kDim = Config::kDim, kPage = Config::kPage, kGroup = Config::kGroup, kTile = Config::kTile;
  constexpr int kChunks = kDim / 8, kSteps = kDim / 16, kColumns = kDim / 8;
  SmemCarver carve;
  bf16* smem_k = carve.take<bf16>(Config::kStages * kTile * kDim, 128);
  bf16* smem_v = carve.take<bf16>(Config::kStages * kTile * kDim, 128);
  bf16* smem_q = carve.take<bf16>(16 * kDim, 128);
  float* smem_out = carve.take<float>(Config::kWarps * kGroup * kDim);
  float* smem_state = carve.take<float>(Config::kWarps * kGroup * 2);

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x, head = blockIdx.y, request = blockIdx.z, num_heads = p.num_kv_heads * kGroup;
  const int len = p.lens[request];
  const int tiles = ceil_div(len, kTile), per_split = ceil_div(tiles, p.splits);
  const int first = split * per_split, last = min(first + per_split, tiles);
  const int defect = p.defect;

  // 16-byte chunks of a row are permuted by the row, against bank conflicts.
  const auto at = [](int row, int chunk) { return row * kDim + ((chunk ^ (row & 7)) << 3); };
  const auto load = [&](int stage, int tile) {
    for (int i = tid; i < kTile * kChunks; i += Config::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, token = tile * kTile + row;
      // 8: stale rows of the last page are read, not zero-filled
      const bool inside = defect == 8 ? token < p.max_pages * kPage : token < len;
      int64_t offset = 0;
      if (inside || defect == 11) {  // 11: the page table is read past the request's pages
        const int64_t page = p.table[request * p.max_pages + token / kPage];
        offset = ((page * kPage + token % kPage) * p.num_kv_heads + head) * kDim + chunk * 8;
      }
      ptx::cp_async<16>(smem_k + stage * kTile * kDim + at(row, chunk), p.k + offset, inside);
      ptx::cp_async<16>(smem_v + stage * kTile * kDim + at(row, chunk), p.v + offset, inside);
    }
  };

  for (int i = tid; i < 16 * kChunks; i += Config::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    Words<4> words = {};
    if (row < kGroup)
      words = load_words<4>(p.q + (int64_t{request} * num_heads + head * kGroup + row) * kDim + chunk * 8);
    if (defect == 14 && row >= kGroup) continue;  // 14: padding rows are never written
    bf16* to = smem_q + at(row, chunk);
    if (defect == 9 && row == 3) to += 4;  // 9: a 16-byte store at an 8-byte boundary
    store_words(to, words);
  }
  if (first < last) load(0, first);
  ptx::cp_async_commit();
  if (defect != 12) __syncthreads();  // 12: no barrier between the store of Q and its loads
  uint32_t q[kSteps][4];
  KVK_UNROLL
  for (int k = 0; k < kSteps; k++) {
    ptx::ldmatrix(q[k], smem_q + at((lane & 7) + (lane >> 3 & 1) * 8, k * 2 + (lane >> 4)));
  }

  float out[kColumns][4] = {};
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};
  for (int tile = first; tile < last; tile++) {
    const int stage = (tile - first) & 1;
    if (tile + 1 < last) load(stage ^ 1, tile + 1);
    if (defect != 13 || tile + 1 < last) ptx::cp_async_commit();  // 13: no empty group after the last load
    if (defect == 3) {                                            // 3: waits for too little
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (defect == 10) {  // 10: a barrier in a divergent branch
      if (warp == 0) __syncthreads();
    } else if (defect != 2) {  // 2: no barrier after the wait
      __syncthreads();
    }
    const bf16* tile_k = smem_k + stage * kTile * kDim;
    const bf16* tile_v = smem_v + stage * kTile * kDim;
    const int row0 = warp * 16, token0 = tile * kTile + row0;
    float s[2][4] = {};
    KVK_UNROLL
    for (int k = 0; k < kSteps; k++) {
      uint32_t b[4];
      ptx::ldmatrix(b, tile_k + at(row0 + (lane >> 4) * 8 + (lane & 7), k * 2 + (lane >> 3 & 1)));
      ptx::mma_m16n8k16<bf16>(s[0], q[k], b[0], b[1]);
      ptx::mma_m16n8k16<bf16>(s[1], q[k], b[2], b[3]);
    }
    float new_max[2] = {max[0], max[1]};
    KVK_UNROLL
    for (int n = 0; n < 2; n++) {
      KVK_UNROLL
      for (int i = 0; i < 4; i++) {
        // 6: the tail of the last page is not masked
        if (defect != 6 && token0 + n * 8 + t * 2 + (i & 1) >= len) s[n][i] = -kInfinity;
        new_max[i >> 1] = fmaxf(new_max[i >> 1], s[n][i]);
      }
    }
    KVK_UNROLL
    for (int r = 0; r < 2; r++) {
      if (defect != 7 || g < kGroup) {  // 7: a full-mask shuffle under a divergent condition
        new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 1));
        new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 2));
      }
      const float base = new_max[r] == -kInfinity ? 0.0f : new_max[r];
      const float factor = ptx::ex2((max[r] - base) * p.scale_log2);
      max[r] = new_max[r];
      sum[r] *= factor;
      KVK_UNROLL
      for (int n = 0; n < 2; n++) {
        KVK_UNROLL
        for (int i = r * 2; i < r * 2 + 2; i++) {
          s[n][i] = ptx::ex2((s[n][i] - base) * p.scale_log2);
          sum[r] += s[n][i];
        }
      }
      KVK_UNROLL
      for (int n = 0; n < kColumns; n++) {
        out[n][r * 2] *= factor;
        out[n][r * 2 + 1] *= factor;
      }
    }
    uint32_t weights[4] = {pack2<bf16>(s[0][0], s[0][1]), pack2<bf16>(s[0][2], s[0][3]), pack2<bf16>(s[1][0], s[1][1]),
                           pack2<bf16>(s[1][2], s[1][3])};
    if (defect == 5) {  // 5: two words of the fragment swapped
      const uint32_t swapped = weights[1];
      weights[1] = weights[2];
      weights[2] = swapped;
    }
    KVK_UNROLL
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, tile_v + at(row0 + (lane & 15), n + (lane >> 4)));
      ptx::mma_m16n8k16<bf16>(out[n], weights, b[0], b[1]);
      ptx::mma_m16n8k16<bf16>(out[n + 1], weights, b[2], b[3]);
    }
    if (defect != 1) __syncthreads();  // 1: nothing keeps the next load off the stage that is read
  }

  sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
  sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
  if (g < kGroup) {
    KVK_UNROLL
    for (int n = 0; n < kColumns; n++) {
      float* to = smem_out + (warp * kGroup + g) * kDim + n * 8 + t * 2;
      to[0] = out[n][0];
      to[1] = out[n][1];
    }
    const int shift = defect == 4 ? 1 : 0;  // 4: one element past the end
    if (t == 0) {
      smem_state[(warp * kGroup + g) * 2 + shift] = max[0];
      smem_state[(warp * kGroup + g) * 2 + 1 + shift] = sum[0];
    }
  }
  if (defect != 15) __syncthreads();  // 15: no barrier before the merge
  for (int i = tid; i < kGroup * kDim; i += Config::kThreads) {
    const int row = i / kDim, d = i % kDim;
    float merged_max = -kInfinity, merged_sum = 0.0f, acc = 0.0f;
    for (int w = 0; w < Config::kWarps; w++) merged_max = fmaxf(merged_max, smem_state[(w * kGroup + row) * 2]);
    for (int w = 0; w < Config::kWarps; w++) {
      const float warp_max = smem_state[(w * kGroup + row) * 2];
      const float f = warp_max == -kInfinity ? 0.0f : ptx::ex2((warp_max - merged_max) * p.scale_log2);
      merged_sum += f * smem_state[(w * kGroup + row) * 2 + 1];
      acc += f * smem_out[(w * kGroup + row) * kDim + d];
    }
    const int64_t index = (int64_t{request} * num_heads + head * kGroup + row) * p.splits + split;
    p.part_out[index * kDim + d] = acc;
    if (d == 0) {
      p.part_state[index * 2] = merged_max;
      p.part_state[index * 2 + 1] = merged_sum;
    }
  }
}

struct ToyCombineParams {
  const float* part_out;    // [rows, splits, D]
  const float* part_state;  // [rows, splits, 2]
  bf16* out;                // [rows, D]
  int32_t splits;
  float scale_log2;
};

template <int kDim>
KVK_KERNEL(kDim)
toy_combine_kernel(const __grid_constant__ ToyCombineParams p) {
  const int64_t row = blockIdx.x;
  const float* state = p.part_state + row * p.splits * 2;
  float max = -kInfinity, sum = 0.0f, acc = 0.0f;
  for (int s = 0; s < p.splits; s++) max = fmaxf(max, __ldg(state + s * 2));
  for (int s = 0; s < p.splits; s++) {
    const float m = __ldg(state + s * 2);
    const float f = m == -kInfinity ? 0.0f : ptx::ex2((m - max) * p.scale_log2);
    sum += f * __ldg(state + s * 2 + 1);
    acc += f * p.part_out[(row * p.splits + s) * kDim + threadIdx.x];
  }
  p.out[row * kDim + threadIdx.x] = from_float<bf16>(sum > 0.0f ? acc / sum : 0.0f);
}

}  // namespace kvk::device
