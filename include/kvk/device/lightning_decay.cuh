// The gradient of the log decays of lightning attention. With S the state before a chunk, R the gradient of the state after it,
// G as in lightning_chunk.cuh and P_ij = scale * (q_i . k_j) (dO_i . v_j) exp(G_i - G_j), what has passed the decay of token t is
//   from a token before it to one at it or after it     sum over j < t <= i of P_ij
//   from S                                              sum over i >= t of scale * exp(G_i) * q_i . (S dO_i)
//   to R                                                sum over j < t of exp(G_last - G_j) * k_j . (R v_j)
//   from S to R                                         exp(G_last) <S, R>
// and dg_t is the sum of the four: no differences of larger sums, which would leave nothing of a gradient as small as exp(-10).
// The last one wants S and R at a time: a first walk through the chunks keeps their S, a second one from the end makes R.
//
// FLOPs a token and head: C Dk + 24 Dk Dv, with C = 64, S and R as three bf16 parts. Bytes: q, k, v, dO twice, and S of each
// chunk in fp32 written and read, 8 Dk Dv / C: at 128 x 128 in bf16 as many as the rows, and some 100 FLOPs a byte; an H100
// does about 180 in that time: bound by memory.
// Tile: a block takes one head of one sequence, up to 128 channels of q and k and 64 of v and dO, in whose products all four are
// linear; a warp 16 of the 64. What the blocks found is summed by a second kernel in a fixed order. One stage: two blocks share a
// multiprocessor.
#pragma once

#include "kvk/device/lightning_state.cuh"

namespace kvk::device {

template <class Config>
class LightningDecayGradient {
 public:
  using T = typename Config::T;
  static constexpr int kChunk = LightningShape::kChunk, kColumns = LightningShape::kColumns;
  static constexpr int kDim = Config::kDim, kPitch = Config::kPitch, kValuePitch = LightningShape::kValuePitch;

  KVK_DEVICE LightningDecayGradient(const LightningDecayParams& p, SmemCarver carve)
      : p_(p), q_(carve.take<T>(Config::kShape.key_elements())), k_(carve.take<T>(Config::kShape.key_elements())),
        v_(carve.take<T>(Config::kShape.value_elements())), grad_(carve.take<T>(Config::kShape.value_elements())),
        pairs_(carve.take<float>(LightningDecayShape::kPairs)),
        decays_(carve.take<float>(LightningShape::kDecayFloats)), sums_(carve.take<float>(LightningDecayShape::kSums)),
        products_(carve.take<double>(LightningShape::kWarps)), totals_(carve.take<double>(32)),
        item_(*carve.take<LightningItem>(1)) {}

  KVK_DEVICE void run() {
    LightningItem item;
    const bool owned = item.find(p_.sequences, p_.num_heads, p_.tiles * kColumns);
    if (threadIdx.x == 0) item_ = item;
    __syncthreads();
    if (!owned) return clear();
    const int64_t chunks = ceil_div<int64_t>(item_.tokens, kChunk);
    load_state(p_.initial);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      fetch(chunk);
      keep(chunk);
      dot_columns(kept(chunk), q_, grad_);
      __syncthreads();  // the sums of all warps are there
      if (warp() == 0) keep_past(chunk);
      state_.add(v_ + warp() * 16, k_, decay().whole(), [&](int token) { return decay().to_end(token); });
    }
    state_ = State();
    load_state(p_.grad_final);
    if (warp() == 0) totals_[lane()] = 0;
    for (int64_t chunk = chunks; chunk-- > 0;) {
      fetch(chunk);
      keep(chunks);
      const double product = multiply_states(kept(chunk), kept(chunks));
      if (lane() == 0) products_[warp()] = product;
      dot_columns(kept(chunks), k_, v_);
      pairs();
      __syncthreads();  // what all warps have found is there
      if (warp() == 0) combine(chunk);
      state_.add(grad_ + warp() * 16, q_, decay().whole(), [&](int token) { return since_start(token); });
    }
    if (p_.per_token || warp() != 0) return;
    const double total = warp_sum(totals_[lane()]);
    if (lane() == 0) p_.parts[(item_.sequence * p_.tiles + tile()) * p_.num_heads + item_.head] = total;
  }

 private:
  using State = WarpState<T, kDim, kPitch>;
  using Columns = typename State::Columns;
  using Fragment = typename State::Fragment;

  KVK_DEVICE static int lane() { return threadIdx.x % 32; }
  KVK_DEVICE static int warp() { return threadIdx.x / 32; }
  // Of the tiles of a head, and its first row and column of the state.
  KVK_DEVICE int tile() const { return item_.column / kColumns; }
  KVK_DEVICE int first_key() const { return tile() / p_.value_tiles * kDim; }
  KVK_DEVICE int first_value() const { return tile() % p_.value_tiles * kColumns; }
  KVK_DEVICE ChunkDecay decay() const { return ChunkDecay(decays_); }
  KVK_DEVICE float since_start(int token) const { return decay().since_start(token) * p_.scale; }

  KVK_DEVICE void load_state(const StateView& view) {
    const float* from = item_.state(view);
    if (from == nullptr) return;
    state_.load(from + first_key() * view.row_stride, view, p_.dk - first_key(), p_.dv, first_value() + warp() * 16);
  }

  // A chunk's rows and decays.
  KVK_DEVICE void fetch(int64_t chunk) {
    const int64_t first = chunk * kChunk;
    __syncthreads();  // all are done with the chunk before
    for (int i = 0; i < 2; ++i) {
      const SequenceView &keys = i == 0 ? p_.q : p_.k, &values = i == 0 ? p_.grad : p_.v;
      copy_chunk<kDim, kPitch>(i == 0 ? q_ : k_, item_.rows<const T>(keys) + first_key(), keys.token_stride, first,
                               item_.tokens, p_.dk - first_key());
      copy_chunk<kColumns, kValuePitch>(i == 0 ? grad_ : v_, item_.rows<const T>(values) + first_value(),
                                        values.token_stride, first, item_.tokens, p_.dv - first_value());
    }
    ptx::cp_async_commit();
    if (warp() == 0) {
      const float* logs = item_.rows<const float>(p_.log_decay);
      decay().prepare(ChunkDecay::load(logs, p_.log_decay.token_stride, 0, first, item_.tokens));
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the chunk and its decays are there for all
  }

  // Where this thread keeps its part of the state before a chunk, and of R in the place behind the last one: a piece of 16 bytes
  // for 8 rows of the state, those of a block's threads beside each other.
  static constexpr int kPieces = LightningShape::kThreads * 4;  // floats from one to the next
  KVK_DEVICE float* kept(int64_t chunk) const {
    const int64_t before = p_.sequences.starts == nullptr ? item_.sequence * (p_.row_chunks + 1)
                                                          : item_.first / kChunk + item_.sequence * 2;
    const int64_t place = ((before + chunk) * p_.num_heads + item_.head) * p_.tiles + tile();
    return p_.states + place * (kDim / 8) * kPieces + threadIdx.x * 4;
  }
  KVK_DEVICE void keep(int64_t chunk) const {
    float* to = kept(chunk);
    KVK_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      const Fragment& s = state_.fragment(n);
      store_words<4>(to + n * kPieces,
                     {{__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])}});
    }
  }

  // In all lanes, <S, R> of this warp's columns, as they were kept.
  KVK_DEVICE static double multiply_states(const float* s, const float* r) {
    double product = 0;
    KVK_NO_UNROLL
    for (int first = 0; first < kDim / 8; first += 2) {
      float sum = 0;
      KVK_UNROLL
      for (int n = first; n < first + 2; ++n) {
        const Words<4> a = load_words<4>(s + n * kPieces), b = load_words<4>(r + n * kPieces);
        KVK_UNROLL
        for (int i = 0; i < 4; ++i) sum += __uint_as_float(a.w[i]) * __uint_as_float(b.w[i]);
      }
      product += static_cast<double>(sum);
    }
    return warp_sum(product);
  }

  // Of each token x^T S y, as far as it comes from this warp's columns. S is read as it was kept: from the registers, in a loop
  // that is unrolled, the compiler would have all its parts at a time.
  KVK_DEVICE void dot_columns(const float* kept, const T* x, const T* y) const {
    Columns products = {};
    Words<4> low = load_words<4>(kept), high = load_words<4>(kept + kPieces);
    KVK_NO_UNROLL
    for (int step = 0; step < kDim / 16; ++step) {
      Fragment s[2];
      KVK_UNROLL
      for (int i = 0; i < 4; ++i) {
        s[0][i] = __uint_as_float(low.w[i]);
        s[1][i] = __uint_as_float(high.w[i]);
      }
      if (step + 1 < kDim / 16) {
        kept += 2 * kPieces;
        low = load_words<4>(kept);
        high = load_words<4>(kept + kPieces);
      }
      State::template read_step<State::kParts>(s[0], s[1], x + step * 16, products);
    }
    const T* row = y + lane() % 4 * 2 * kValuePitch + warp() * 16 + lane() / 4;
    KVK_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) {
      KVK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const T* at = row + (n * 8 + i) * kValuePitch;
        float sum = products[n][i] * to_float(at[0]) + products[n][i + 2] * to_float(at[8]);
        KVK_UNROLL
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane() < 4) sums_[warp() * kChunk + n * 8 + lane() * 2 + i] = sum;
      }
    }
  }
  KVK_DEVICE double of_all_warps(int token) const {
    float sum = 0;
    KVK_UNROLL
    for (int w = 0; w < LightningShape::kWarps; ++w) sum += sums_[w * kChunk + token];
    return sum;
  }

  // Where a number for each token is, of this block: place 0 is the first token's.
  KVK_DEVICE int64_t place(int64_t token) const {
    const int64_t rows = tile() * p_.num_rows + item_.batch;
    return (rows * p_.sequences.num_tokens + item_.first + token) * p_.num_heads + item_.head;
  }
  // Warp 0: what comes from S to each token.
  KVK_DEVICE void keep_past(int64_t chunk) const {
    KVK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int token = lane() * 2 + i;
      if (chunk * kChunk + token >= item_.tokens) continue;
      p_.past[place(chunk * kChunk + token)] = of_all_warps(token) * since_start(token);
    }
  }

  // P below the diagonal, row by row. expf keeps its digits where decays are strong; ex2 would not.
  KVK_DEVICE static int pair(int to, int from) { return to * (to - 1) / 2 + from; }
  KVK_DEVICE void pairs() const {
    each_block_of_triangle([&](int i, int j) {
      float a[2][4] = {}, da[2][4] = {};
      multiply_rows<kDim, kPitch>(q_, k_, i, j, a);
      multiply_rows<kColumns, kValuePitch>(grad_, v_, i, j, da);
      KVK_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int to = i + e / 2 % 2 * 8 + lane() / 4, from = j + e / 4 * 8 + lane() % 4 * 2 + e % 2;
        if (from >= to) continue;
        pairs_[pair(to, from)] = a[e / 4][e % 4] * p_.scale * da[e / 4][e % 4] * expf(decay().log_between(to, from));
      }
    });
  }

  // Warp 0: the gradients of a chunk, two tokens a lane, and their sum over this lane's.
  KVK_DEVICE void combine(int64_t chunk) const {
    // Down each column: P_ij becomes the sum over all i' >= i.
    KVK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int from = half * 32 + lane();
      float sum = 0;
      KVK_NO_UNROLL
      for (int top = kChunk - 1; top > half * 32; top -= 8) {
        float x[8];  // read before any is written, so that the loads are under way together
        KVK_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = top - i > from ? pairs_[pair(top - i, from)] : 0.0f;
        KVK_UNROLL
        for (int i = 0; i < 8; ++i) {
          sum += x[i];
          if (top - i > from) pairs_[pair(top - i, from)] = sum;
        }
      }
    }
    __syncwarp();  // the sums of all columns are there
    double crossing[2], past[2], future[2];
    KVK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int token = lane() * 2 + i;
      float sum = 0;
      for (int from = 0; from < token; ++from) sum += pairs_[pair(token, from)];
      crossing[i] = sum;
      past[i] = chunk * kChunk + token < item_.tokens ? p_.past[place(chunk * kChunk + token)] : 0.0;
      future[i] = of_all_warps(token) * decay().to_end(token);
    }
    double through = 0;
    KVK_UNROLL
    for (int w = 0; w < LightningShape::kWarps; ++w) through += products_[w];
    through *= decay().whole();
    // From this lane's tokens on, and before them.
    double after = past[0] + past[1], before = future[0] + future[1];
    KVK_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const double later = __shfl_down_sync(0xffffffffu, after, step);
      const double earlier = __shfl_up_sync(0xffffffffu, before, step);
      if (lane() + step < 32) after += later;
      if (lane() >= step) before += earlier;
    }
    const double up_to_here = __shfl_up_sync(0xffffffffu, before, 1);
    const double beyond = __shfl_down_sync(0xffffffffu, after, 1);
    const double earlier = lane() == 0 ? 0.0 : up_to_here, later = lane() == 31 ? 0.0 : beyond;
    const double first = crossing[0] + (past[0] + past[1] + later) + earlier + through;
    const double second = crossing[1] + (past[1] + later) + (earlier + future[0]) + through;
    totals_[lane()] += put(chunk * kChunk + lane() * 2, first) + put(chunk * kChunk + lane() * 2 + 1, second);
  }
  // A token's gradient, or 0 past the end.
  KVK_DEVICE double put(int64_t token, double x) const {
    if (token >= item_.tokens) return 0;
    if (p_.per_token) p_.parts[place(token)] = x;
    return x;
  }

  // Tokens of no sequence.
  KVK_DEVICE void clear() const {
    if (!p_.per_token) return;
    for (int64_t i = threadIdx.x; i < item_.tokens; i += LightningShape::kThreads) p_.parts[place(i)] = 0;
  }

  const LightningDecayParams& p_;
  T *q_, *k_, *v_, *grad_;
  float *pairs_, *decays_, *sums_;
  double *products_, *totals_;  // of the warps; of the lanes of warp 0
  LightningItem& item_;
  State state_;  // S, then R
};

template <class Config>
KVK_KERNEL(LightningShape::kThreads, 1)
lightning_decay_kernel(const __grid_constant__ LightningDecayParams params) {
  LightningDecayGradient<Config>(params, SmemCarver()).run();
}

// Sums of parts, in an order that depends on nothing but their number: a thread or a warp a sum.
template <int kThreads>
KVK_KERNEL(kThreads, 1)
sum_parts_kernel(const __grid_constant__ SumPartsParams p) {
  const int lanes = p.warp_each ? 32 : 1;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < p.count * lanes;
       at += int64_t{gridDim.x} * kThreads) {
    const int64_t row = at / lanes;
    double sum = 0;
    for (int64_t part = at % lanes; part < p.num_parts; part += lanes) sum += p.parts[part * p.count + row];
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const int64_t head = row % p.num_heads, token = row / p.num_heads % p.num_tokens;
    if (at % lanes != 0) continue;
    static_cast<float*>(p.to.data)[row / p.num_heads / p.num_tokens * p.to.batch_stride + token * p.to.token_stride +
                                   head * p.to.head_stride] = static_cast<float>(sum);
  }
}

}  // namespace kvk::device
