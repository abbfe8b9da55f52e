// Attention of few query rows per kv head (decode, speculative verification) over a request's pages: split keys, one pass,
// merge.
//
// Bytes: every key and value once per kv head, 2 * keys * Hkv * D * 2, plus partial results under 2% of that.
// FLOPs: 4 * keys * Hq * D, done on tiles of 16 query rows: at 4 query heads a kv head a tile of 16 keys is 8 KiB of
// memory and 32 mma, some 400 cycles of an SM's share of HBM and 64 of its tensor cores: bound by memory.
// Tile: one warp takes 16 keys at a time with all query heads of one kv head, so each page is read once per kv head.
// Pipeline: every warp has its own ring of stages filled by cp.async; no block barrier until the four warps merge.
#pragma once

#include "kvk/device/dense_pages.cuh"
#include "kvk/device/paged_decode_params.h"
#include "kvk/device/paged_item.cuh"
#include "kvk/device/ptx.h"
#include "kvk/device/score.cuh"
#include "kvk/device/smem.h"
#include "kvk/device/softmax.cuh"
#include "kvk/device/tile_products.cuh"
#include "kvk/device/types.h"

namespace kvk::device {

// The rows and columns that a warp's fragments hold: attention state of kRows query rows over head_dim_v.
template <class Config>
class DecodeRows {
 public:
  using T = typename Config::T;
  static constexpr int kSteps = Config::kDim / 16, kTilesV = Config::kDimV / 8;

  KVK_DEVICE DecodeRows(const PagedProblem& p, const T* queries, int lane)
      : p_(p), score_(p.softmax_scale, p.logits_soft_cap), queries_(queries), lane_(lane) {
    if constexpr (Config::kQueriesInRegisters) {
      KVK_UNROLL
      for (int step = 0; step < kSteps; ++step) ptx::ldmatrix(q_[step], query_row(step));
    }
  }

  // One tile of 16 keys, the first of them at position `first`. Of key i of the tile: bias(i), and, where queries have
  // several terms, whether it is dense(i).
  template <class Bias, class IsDense>
  KVK_DEVICE void attend(const PagedItem<Config::kParts>& item, const RowMask<Config::kParts> (&masks)[2],
                         int32_t first, const T* k, const T* v, const Bias& bias, const IsDense& dense) {
    if constexpr (Config::kQueryTerms == 3) {
      KVK_UNROLL
      for (int i = 0; i < 2; ++i) dense_[i] = dense(lane_ / 4 + 8 * i);
    }
    float s[2][4] = {};
    scores(k, s);
    bool hidden = false;  // some row does not see a key that another may see
    KVK_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i / 2 >= Config::kHalves) continue;
        const int column = tile * 8 + lane_ % 4 * 2 + i % 2;
        const int32_t key = first + column;
        const RowMask<Config::kParts>& mask = masks[i / 2];
        const float b = bias(column);
        const bool seen = mask.sees(p_, key);
        hidden |= !seen && key >= item.begin && key < item.end;
        s[tile][i] = seen && key >= item.begin && key < item.end
                         ? score_(s[tile][i], mask.slope, static_cast<float>(mask.distance(key)), b)
                         : -kInfinity;
      }
    }
    KVK_UNROLL
    for (int half = 0; half < Config::kHalves; ++half) reweigh(s, half);
    if (__any_sync(0xffffffffu, hidden) && !tile_is_finite<Config::kDimV, Config::kPitchV>(v, Config::kKeys, lane_)) {
      accumulate_seen(s, v);
      return;
    }
    const uint32_t p[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]), pack2<T>(s[1][0], s[1][1]),
                           pack2<T>(s[1][2], s[1][3])};
    KVK_UNROLL
    for (int tile = 0; tile < kTilesV; tile += 2) {
      uint32_t b[4];
      ptx::ldmatrix_trans(b, v + lane_ % 16 * Config::kPitchV + (tile + lane_ / 16) * 8);
      ptx::mma_m16n8k16<T>(out_[tile], p, b[0], b[1]);
      ptx::mma_m16n8k16<T>(out_[tile + 1], p, b[2], b[3]);
    }
  }

  // Writes this warp's rows: out [kRows, kDimV] and state [kRows].
  KVK_DEVICE void store(float* out, RowState* state) const {
    KVK_UNROLL
    for (int half = 0; half < Config::kHalves; ++half) {
      const int row = lane_ / 4 + half * 8;
      const float sum = quad_sum(state_[half].sum);
      if (lane_ % 4 == 0) state[row] = {state_[half].max, sum};
      KVK_UNROLL
      for (int tile = 0; tile < kTilesV; ++tile) {
        float* to = out + row * Config::kDimV + tile * 8 + lane_ % 4 * 2;
        to[0] = out_[tile][half * 2];
        to[1] = out_[tile][half * 2 + 1];
      }
    }
  }

 private:
  KVK_DEVICE const T* query_row(int step) const {
    return queries_ + (lane_ % 8 + lane_ / 8 % 2 * 8) * Config::kPitch + (step * 2 + lane_ / 16) * 8;
  }

  // s = q k^T: keys 0 to 7 in s[0], 8 to 15 in s[1].
  KVK_DEVICE void scores(const T* k, float (&s)[2][4]) const {
    if constexpr (Config::kQueriesInRegisters) {
      KVK_UNROLL
      for (int step = 0; step < kSteps; ++step) score_step(q_[step], k, step, 0, s);
    } else {
      KVK_NO_UNROLL  // the output takes the registers
          for (int step = 0; step < kSteps; ++step) {
        KVK_UNROLL
        for (int term = 0; term < Config::kQueryTerms; ++term) {
          uint32_t a[4];
          ptx::ldmatrix(a, query_row(step) + term * 16 * Config::kPitch);
          score_step(a, k, step, term, s);
        }
      }
    }
  }

  KVK_DEVICE void score_step(const uint32_t (&a)[4], const T* k, int step, [[maybe_unused]] int term,
                             float (&s)[2][4]) const {
    uint32_t b[4];
    ptx::ldmatrix(b, k + (lane_ % 8 + lane_ / 16 * 8) * Config::kPitch + (step * 2 + lane_ / 8 % 2) * 8);
    if constexpr (Config::kQueryTerms ==
                  3) {  // a dense key counts with the query as it is, others with the rotated one
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) b[i] = dense_[i / 2] == (term == 2) ? b[i] : 0u;
    }
    ptx::mma_m16n8k16<T>(s[0], a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(s[1], a, b[2], b[3]);
  }

  // Scores to weights in place, for rows lane / 4 + 8 * half.
  KVK_DEVICE void reweigh(float (&s)[2][4], int half) {
    float max = state_[half].max;
    KVK_UNROLL
    for (int tile = 0; tile < 2; ++tile) max = fmaxf(max, fmaxf(s[tile][half * 2], s[tile][half * 2 + 1]));
    max = quad_max(max);
    const float base = softmax_base(max), factor = ptx::ex2(state_[half].max - base);
    float sum = 0.0f;
    KVK_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      KVK_UNROLL
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        // An unseen key gets -0, which ex2 never gives (accumulate_seen).
        s[tile][i] = s[tile][i] == -kInfinity ? -0.0f : ptx::ex2(s[tile][i] - base);
        sum += s[tile][i];
      }
    }
    state_[half] = {max, state_[half].sum * factor + sum};  // each lane sums its own columns until the end
    KVK_UNROLL
    for (int tile = 0; tile < kTilesV; ++tile) {
      out_[tile][half * 2] *= factor;
      out_[tile][half * 2 + 1] *= factor;
    }
  }

  // The rare tile in which V holds NaN or infinities and some row does not see some key: 0 * NaN must not enter a row that
  // does not read that key. Weight (row, key) is in the quad lane of that key's column.
  KVK_DEVICE void accumulate_seen(const float (&s)[2][4], const T* v) {
    for (int key = 0; key < Config::kKeys; ++key) {
      KVK_UNROLL
      for (int half = 0; half < Config::kHalves; ++half) {
        const float even = key < 8 ? s[0][half * 2] : s[1][half * 2];
        const float odd = key < 8 ? s[0][half * 2 + 1] : s[1][half * 2 + 1];
        const float p = __shfl_sync(0xffffffffu, key % 2 == 0 ? even : odd, (lane_ & ~3) + key % 8 / 2);
        if (__float_as_uint(p) == 0x80000000u) continue;
        KVK_UNROLL
        for (int tile = 0; tile < kTilesV; ++tile) {
          const T* from = v + key * Config::kPitchV + tile * 8 + lane_ % 4 * 2;
          out_[tile][half * 2] += p * to_float(from[0]);
          out_[tile][half * 2 + 1] += p * to_float(from[1]);
        }
      }
    }
  }

  const PagedProblem& p_;
  Score<Config::kParts> score_;
  const T* queries_;
  int lane_;
  bool dense_[2] = {};  // of this lane's columns of K
  uint32_t q_[Config::kQueriesInRegisters ? kSteps : 1][4];
  float out_[kTilesV][4] = {};
  RowState state_[2];
};

template <class Config>
class DecodeBlock {
 public:
  using T = typename Config::T;
  using Pages = typename Config::Pages;
  using Params = typename Pages::DecodeParams;

  KVK_DEVICE DecodeBlock(const Params& params, SmemCarver carve)
      : params_(params), p_(params.problem), ring_(carve, params, threadIdx.x / 32) {
    queries_ = carve.take<T>(Config::kShape.query_elements());
    state_ = carve.take<RowState>(Config::kShape.states());
    lane_ = threadIdx.x % 32;
    warp_ = threadIdx.x / 32;
  }

  // Block x is a (request, kv head, tile of its query rows); blocks along y share its splits among them.
  KVK_DEVICE void run() {
    const int32_t tile = blockIdx.x % params_.row_tiles;
    const int32_t pair = blockIdx.x / params_.row_tiles;
    item_.request = pair / p_.num_kv_heads;
    item_.kv_head = pair % p_.num_kv_heads;
    item_.token = p_.first_token(item_.request);
    const int64_t tokens = p_.num_request_tokens(item_.request);
    if (!is_streamed(tokens, p_.group)) return;
    item_.num_tokens = static_cast<int32_t>(tokens);
    item_.first_row = tile * Config::kRows;
    const int32_t rest = item_.num_tokens * p_.group - item_.first_row;
    item_.rows = rest < Config::kRows ? rest : Config::kRows;
    if (item_.rows <= 0) return;
    item_.len = static_cast<int32_t>(p_.list.len(item_.request, item_.kv_head));
    item_.pages = p_.list.pages(item_.request, item_.kv_head);
    const KeyRange keys = visible_keys(item_.len, item_.len - tokens, tokens, p_.causal, p_.window_left);
    const Splits splits = split_keys(keys.end - keys.begin);
    if (static_cast<int32_t>(blockIdx.y) < splits.count) load_queries();
    for (int32_t split = blockIdx.y; split < splits.count; split += gridDim.y) {
      const int64_t begin = keys.begin + int64_t{split} * splits.keys_per_split, end = begin + splits.keys_per_split;
      item_.begin = static_cast<int32_t>(begin);
      item_.end = static_cast<int32_t>(end < keys.end ? end : keys.end);
      attend();
      finish(split, splits.count);
    }
  }

 private:
  KVK_DEVICE void load_queries() {
    if constexpr (Config::kQueryTerms == 3) {
      load_rotated_queries<Config, 16>(params_, item_, queries_, ring_.scratch());
      __syncthreads();
      return;
    }
    constexpr int kChunks = Config::kDim / 8;
    for (int i = threadIdx.x; i < 16 * kChunks; i += Config::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      Words<4> words = {};
      if (row < item_.rows && chunk * 8 < Config::kHeadDim) {
        words = load_words<4>(static_cast<const T*>(p_.q.data) +
                              (item_.token + item_.token_of(p_, row)) * p_.q.token_stride +
                              item_.head_of(p_, row) * p_.q.head_stride + chunk * 8);
      }
      store_words(queries_ + row * Config::kPitch + chunk * 8, words);
    }
    __syncthreads();
  }

  KVK_DEVICE void attend() {
    DecodeRows<Config> rows(p_, queries_, lane_);
    RowMask<Config::kParts> masks[2];
    KVK_UNROLL
    for (int half = 0; half < Config::kHalves; ++half) {
      const int row = lane_ / 4 + half * 8;
      if (row < item_.rows) masks[half] = RowMask<Config::kParts>(p_, item_, row);  // padding rows see nothing
    }

    // Warp w takes tiles w, w + 4, .. of 16 keys.
    constexpr int kStride = Config::kWarps * Config::kKeys, kAhead = Config::kStages - 1;
    const int32_t start = item_.begin + warp_ * Config::kKeys;
    const int tiles = item_.end > start ? ceil_div(item_.end - start, kStride) : 0;
    const auto place = [&](int tile) {
      return lane_ < Config::kKeys && tile < tiles ? Pages::place(params_, item_, start + tile * kStride + lane_)
                                                   : typename Pages::Place{};
    };
    KVK_UNROLL
    for (int tile = 0; tile < kAhead; ++tile) {
      if (tile < tiles) ring_.load(item_, tile, start + tile * kStride, place(tile), lane_);
      ptx::cp_async_commit();
    }
    typename Pages::Place next = place(kAhead);  // page ids are fetched one tile before they are needed
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait<kAhead - 1>();
      __syncwarp();  // all lanes' copies of this stage are in, and all lanes are done with the stage refilled next
      if (tile + kAhead < tiles) {
        ring_.load(item_, (tile + kAhead) % Config::kStages, start + (tile + kAhead) * kStride, next, lane_);
      }
      ptx::cp_async_commit();
      next = place(tile + kAhead + 1);
      const int stage = tile % Config::kStages;
      ring_.tile(item_, stage, start + tile * kStride, lane_);
      rows.attend(
          item_, masks, start + tile * kStride, ring_.k(stage), ring_.v(stage),
          [&](int key) { return ring_.bias(stage, key); }, [&](int key) { return ring_.is_dense(stage, key); });
    }
    ptx::cp_async_wait<0>();
    __syncwarp();
    rows.store(ring_.rows(warp_), state_ + warp_ * Config::kRows);
    __syncthreads();
  }

  // Merges the four warps, in their order, and writes the split's partial result or, of an only split, the output.
  KVK_DEVICE void finish(int32_t split, int32_t num_splits) {
    for (int i = threadIdx.x; i < item_.rows * Config::kHeadDimV; i += Config::kThreads) {
      const int r = i / Config::kHeadDimV, d = i % Config::kHeadDimV;
      RowState row = state_[r];
      float acc = ring_.rows(0)[r * Config::kDimV + d];
      KVK_UNROLL
      for (int w = 1; w < Config::kWarps; ++w) {
        const MergeFactors f = merge_rows(row, state_[w * Config::kRows + r]);
        acc = acc * f.a + ring_.rows(w)[r * Config::kDimV + d] * f.b;
      }
      if (num_splits == 1) {
        write_row(p_, item_.token + item_.token_of(p_, r), item_.head_of(p_, r), d, row, acc);
      } else {
        write_partial(params_, int64_t{item_.request} * p_.num_kv_heads + item_.kv_head, item_.first_row + r, split, d,
                      row, acc);
      }
    }
    __syncthreads();  // the next split's rows overwrite these
  }

  KVK_DEVICE static void write_row(const PagedProblem& p, int64_t token, int64_t head, int d, RowState row, float acc) {
    const RowEnd end = finish_row(row, p.sinks ? p.sinks + head * p.sinks_stride : nullptr);
    static_cast<T*>(p.out.data)[token * p.out.token_stride + head * p.out.head_stride + d] =
        from_float<T>(end.factor == 0.0f ? 0.0f : acc * end.factor);
    if (d == 0) p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = end.lse;
  }

  KVK_DEVICE static void write_partial(const PagedDecodeParams& params, int64_t pair, int32_t row_index, int32_t split,
                                       int d, RowState row, float acc) {
    const int64_t at = (pair * params.partial_rows + row_index) * params.split_slots + split;
    params.partial_out[at * Config::kHeadDimV + d] = acc;
    if (d == 0) {
      params.partial_state[at * 2] = row.max;
      params.partial_state[at * 2 + 1] = row.sum;
    }
  }

  const Params& params_;
  const PagedProblem& p_;
  typename Pages::template DecodeRing<Config> ring_;
  PagedItem<Config::kParts> item_;
  T* queries_;
  RowState* state_;
  int lane_, warp_;
};

template <class Config>
KVK_KERNEL(Config::kThreads, 1)
paged_decode_kernel(const __grid_constant__ typename Config::Pages::DecodeParams params) {
  DecodeBlock<Config>(params, SmemCarver()).run();
}

// Merges the splits of each query row, in their order. One warp a row; bytes: every partial result once.
template <class T, int kHeadDimV>
KVK_KERNEL(128, 1)
merge_splits_kernel(const __grid_constant__ PagedDecodeParams params) {
  const PagedProblem& p = params.problem;
  const int64_t index = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;  // of (request, kv head, row)
  const int lane = threadIdx.x % 32;
  const int64_t pair = index / params.partial_rows, r = index % params.partial_rows;
  const int64_t request = pair / p.num_kv_heads, kv_head = pair % p.num_kv_heads;
  if (request >= p.num_requests) return;
  const int64_t tokens = p.num_request_tokens(request);
  if (!is_streamed(tokens, p.group) || r >= tokens * p.group) return;
  const int64_t len = p.list.len(request, kv_head);
  const KeyRange keys = visible_keys(len, len - tokens, tokens, p.causal, p.window_left);
  const Splits splits = split_keys(keys.end - keys.begin);
  if (splits.count == 1) return;

  constexpr int kColumns = (kHeadDimV + 31) / 32;
  const int64_t first = index * params.split_slots;
  RowState row;
  for (int s = 0; s < splits.count; ++s) row.max = fmaxf(row.max, params.partial_state[(first + s) * 2]);
  const float base = softmax_base(row.max);
  float acc[kColumns] = {};
  for (int s = 0; s < splits.count; ++s) {
    const float factor = ptx::ex2(params.partial_state[(first + s) * 2] - base);
    row.sum += factor * params.partial_state[(first + s) * 2 + 1];
    KVK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int d = c * 32 + lane;
      if (d < kHeadDimV) acc[c] += factor * params.partial_out[(first + s) * kHeadDimV + d];
    }
  }
  const int64_t token = p.first_token(request) + r / p.group, head = kv_head * p.group + r % p.group;
  const RowEnd end = finish_row(row, p.sinks ? p.sinks + head * p.sinks_stride : nullptr);
  KVK_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int d = c * 32 + lane;
    if (d < kHeadDimV) {
      static_cast<T*>(p.out.data)[token * p.out.token_stride + head * p.out.head_stride + d] =
          from_float<T>(end.factor == 0.0f ? 0.0f : acc[c] * end.factor);
    }
  }
  if (lane == 0) p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = end.lse;
}

}  // namespace kvk::device
