// The Hadamard transform of one row at one instruction-set level: butterflies in registers over 8 vectors at a time, then in
// passes of radix 8 over the row in cache, then the m x m matrix.
//
// Adds per element: log2(2**k) + m. The sums of 2**k form a tree, in an order that depends on n and the level alone.
#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "kvk/hadamard.h"

namespace kvk::cpu::KVK_LEVEL {

// Lane i becomes lane i ^ kStride.
template <int kStride>
inline V swap_lanes(V x) {
#if defined(__AVX512F__)
  const __m512 v = native(x);
  if constexpr (kStride == 1) return bit_cast<V>(_mm512_permute_ps(v, 0xb1));
  if constexpr (kStride == 2) return bit_cast<V>(_mm512_permute_ps(v, 0x4e));
  if constexpr (kStride == 4) return bit_cast<V>(_mm512_shuffle_f32x4(v, v, 0xb1));
  if constexpr (kStride == 8) return bit_cast<V>(_mm512_shuffle_f32x4(v, v, 0x4e));
#elif defined(__AVX2__)
  const __m256 v = native(x);
  if constexpr (kStride == 1) return bit_cast<V>(_mm256_permute_ps(v, 0xb1));
  if constexpr (kStride == 2) return bit_cast<V>(_mm256_permute_ps(v, 0x4e));
  if constexpr (kStride == 4) return bit_cast<V>(_mm256_permute2f128_ps(v, v, 0x01));
#elif defined(__SSE2__)
  const __m128 v = bit_cast<__m128>(x);
  if constexpr (kStride == 1) return bit_cast<V>(_mm_shuffle_ps(v, v, 0xb1));
  if constexpr (kStride == 2) return bit_cast<V>(_mm_shuffle_ps(v, v, 0x4e));
#else
  return V([&](int i) { return x[i ^ kStride]; });
#endif
}

// One butterfly stage inside each of the vectors: a + b in the lower lane of a pair, a - b in the upper.
template <int kStride, int N>
inline void lane_stage(V (&x)[N]) {
  const V sign([](int i) { return i & kStride ? -1.0f : 1.0f; });
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = swap_lanes<kStride>(x[i]) + x[i] * sign;
}

// All stages of strides below `chunk`, at most W.
template <int N>
inline void lane_stages(V (&x)[N], int chunk) {
  if (chunk > 1) lane_stage<1>(x);
  if (chunk > 2) lane_stage<2>(x);
  if constexpr (W > 4) {
    if (chunk > 4) lane_stage<4>(x);
  }
  if constexpr (W > 8) {
    if (chunk > 8) lane_stage<8>(x);
  }
}

// All stages between N vectors.
template <int N>
inline void vector_stages(V (&x)[N]) {
#pragma GCC unroll 3
  for (int stride = 1; stride < N; stride *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i & stride) continue;
      const V a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}

// Signs of H_m, m in {12, 20, 28}, and of the 20 x 20 matrix whose two-fold is H_40; the constructions are in
// docs/hadamard.md.
template <int M>
struct HadamardSigns {
  float row[M][M];

  constexpr explicit HadamardSigns(bool transpose, bool paley20 = false) : row{} {
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < M; ++j) {
        const bool plus = M == 12 ? paley2(i, j) : paley20 ? paley1(i, j) : williamson(i, j);
        row[transpose ? j : i][transpose ? i : j] = plus ? 1.0f : -1.0f;
      }
    }
  }

 private:
  static constexpr bool is_square(int x, int prime) {
    for (int i = 1; i < prime; ++i) {
      if (i * i % prime == x) return true;
    }
    return false;
  }
  static constexpr bool paley2(int i, int j) {
    const int bi = i / 2, bj = j / 2;
    if (bi == bj) return i % 2 == 0 && j % 2 == 0;
    const bool plus = bi == 0 || bj == 0 || is_square((bj - bi + 5) % 5, 5);
    return plus != (i % 2 == 1 && j % 2 == 1);
  }
  static constexpr bool paley1(int i, int j) {
    if (j == 0) return true;
    return i != 0 && !is_square((j - i + 19) % 19, 19);
  }
  static constexpr bool williamson(int i, int j) {
    constexpr int size = M / 4;
    constexpr const char* circulants[4] = {M == 20 ? "+----" : "+------", M == 20 ? "+----" : "++----+",
                                           M == 20 ? "++--+" : "+-+--+-", M == 20 ? "+-++-" : "+--++--"};
    constexpr bool minus[4][4] = {{false, false, false, false},
                                  {true, false, true, false},
                                  {true, false, false, true},
                                  {true, true, false, false}};
    const int bi = i / size, bj = j / size;
    return (circulants[bi ^ bj][(j % size - i % size + size) % size] == '+') != minus[bi][bj];
  }
};

// out[i * chunk ..] = sum over j of sign[i][j] * x[j * chunk ..], for M chunks; Vec divides the chunk. store_at(vector, index)
// takes the results.
template <class Vec, int M, class Store>
inline void multiply_signs(const HadamardSigns<M>& signs, const float* x, int chunk, Store&& store_at) {
  constexpr int kRows = 4;
  for (int c = 0; c < chunk; c += static_cast<int>(Vec::size())) {
    for (int i = 0; i < M; i += kRows) {
      Vec acc[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r] = 0.0f;
      for (int j = 0; j < M; ++j) {
        const Vec v(x + j * chunk + c, stdx::element_aligned);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r] += v * signs.row[i + r][j];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) store_at(acc[r], (i + r) * chunk + c);
    }
  }
}

class HadamardRow {
 public:
  // n: with hadamard_order(n) > 0.
  HadamardRow(int n, bool transpose) : n_(n), m_(hadamard_order(n)), chunk_(n / m_), transpose_(transpose) {}

  // Floats of scratch, on a multiple of 64 bytes.
  static int64_t scratch_floats(int n) { return 2 * int64_t{padded(n)}; }

  // dst = scale * H src; dst may be src.
  template <class From, class To>
  void run(const From* src, To* dst, float scale, float* scratch) const {
    if (chunk_ < W) {
      short_chunks(src, scale, scratch);
      if (m_ > 1) order(scratch);
      copy_out(m_ > 1 ? scratch + padded(n_) : scratch, dst);
      return;
    }
    // The last pass writes to dst; all of src has been read by then.
    int stride = std::min(8 * W, chunk_);
    const bool one_pass = stride == n_;
    switch (stride / W) {
      case 1: one_pass ? first<1>(src, dst, scale) : first<1>(src, scratch, scale); break;
      case 2: one_pass ? first<2>(src, dst, scale) : first<2>(src, scratch, scale); break;
      case 4: one_pass ? first<4>(src, dst, scale) : first<4>(src, scratch, scale); break;
      default: one_pass ? first<8>(src, dst, scale) : first<8>(src, scratch, scale); break;
    }
    while (stride < chunk_) {
      const int radix = std::min(8, chunk_ / stride);
      const bool last = m_ == 1 && stride * radix == chunk_;
      switch (radix) {
        case 2: last ? pass<2>(scratch, dst, stride) : pass<2>(scratch, scratch, stride); break;
        case 4: last ? pass<4>(scratch, dst, stride) : pass<4>(scratch, scratch, stride); break;
        default: last ? pass<8>(scratch, dst, stride) : pass<8>(scratch, scratch, stride); break;
      }
      stride *= radix;
    }
    if (m_ > 1) {
      order_into(scratch, [dst](const V& x, int i) { store(x, dst + i); }, V());
    }
  }

 private:
  template <int N, class From, class To>
  void first(const From* src, To* dst, float scale) const {
    for (int i = 0; i < n_; i += N * W) {
      V x[N];
#pragma GCC unroll 8
      for (int e = 0; e < N; ++e) x[e] = load(src + i + e * W) * scale;
      lane_stages(x, W);
      vector_stages(x);
#pragma GCC unroll 8
      for (int e = 0; e < N; ++e) store(x[e], dst + i + e * W);
    }
  }

  template <int N, class To>
  void pass(const float* from, To* to, int stride) const {
    for (int i = 0; i < n_; i += N * stride) {
      for (int c = i; c < i + stride; c += W) {
        V x[N];
#pragma GCC unroll 8
        for (int e = 0; e < N; ++e) x[e] = load(from + c + e * stride);
        vector_stages(x);
#pragma GCC unroll 8
        for (int e = 0; e < N; ++e) store(x[e], to + c + e * stride);
      }
    }
  }

  // Chunks shorter than a vector: several of them in each.
  template <class T>
  void short_chunks(const T* src, float scale, float* scratch) const {
    for (int i = 0; i < n_; i += W) {
      V x[1] = {(i + W <= n_ ? load(src + i) : load_partial(src + i, n_ - i)) * scale};
      lane_stages(x, chunk_);
      store(x[0], scratch + i);
    }
  }

  template <class T>
  void copy_out(const float* from, T* dst) const {
    int i = 0;
    for (; i + W <= n_; i += W) store(load(from + i), dst + i);
    if (i < n_) store_partial(load(from + i), dst + i, n_ - i);
  }

  // The m x m matrix, into the second half of scratch.
  void order(float* scratch) const {
    float* to = scratch + padded(n_);
    const auto narrow = [&](auto vec) {
      order_into(scratch, [to](const auto& x, int i) { x.copy_to(to + i, stdx::element_aligned); }, vec);
    };
    switch (chunk_) {
      case 1: narrow(stdx::simd<float, stdx::simd_abi::scalar>()); break;
      case 2: narrow(stdx::fixed_size_simd<float, 2>()); break;
      case 4: narrow(stdx::resize_simd_t<4, V>()); break;
      default: narrow(stdx::resize_simd_t<8, V>()); break;
    }
  }

  template <class Store, class Vec>
  void order_into(float* x, Store&& to, Vec) const {
    static constexpr HadamardSigns<12> k12[2] = {HadamardSigns<12>(false), HadamardSigns<12>(true)};
    static constexpr HadamardSigns<20> k20[2] = {HadamardSigns<20>(false), HadamardSigns<20>(true)};
    static constexpr HadamardSigns<28> k28[2] = {HadamardSigns<28>(false), HadamardSigns<28>(true)};
    static constexpr HadamardSigns<20> k40[2] = {HadamardSigns<20>(false, true), HadamardSigns<20>(true, true)};
    switch (m_) {
      case 12: return multiply_signs<Vec>(k12[transpose_], x, chunk_, to);
      case 20: return multiply_signs<Vec>(k20[transpose_], x, chunk_, to);
      case 28: return multiply_signs<Vec>(k28[transpose_], x, chunk_, to);
      default: break;
    }
    // H_40 is the two-fold of a 20 x 20 matrix.
    const int half = n_ / 2;
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
    multiply_signs<Vec>(k40[transpose_], x, chunk_, to);
    multiply_signs<Vec>(k40[transpose_], x + half, chunk_, [&](const Vec& v, int i) { to(v, i + half); });
  }

  int n_, m_, chunk_;
  bool transpose_;
};

}  // namespace kvk::cpu::KVK_LEVEL
