// The gradient of lightning attention at one instruction-set level, one head of one sequence at a time.
//
// Two passes over the chunks and no memory of the whole sequence. With S the state before a chunk, R the gradient of the
// state after it, w_ij = exp(G_i - G_j), and dA = scale * (dO V^T .* w) for j <= i (checked against central differences in
// the tests):
//   forward:  dQ = dA K + scale * exp(G_i) dO S^T
//   reverse:  dK = dA^T Q + exp(G_last - G_j) V R^T        dV = A^T dO + exp(G_last - G_j) K R
//             R = exp(G_last) R + (scale * exp(G_i) Q)^T dO
// Both dQ and dK come transposed, [Dk, C]: so every product has its long side in rows, and S and R are kept in one order.
// FLOPs: 5 C (Dk + Dv) / 2 + 10 Dk Dv a token and head, counting triangles as halves: 2.6 times the forward pass.
//
// The decays: what crosses from token j < t to token i >= t within the chunk, from S to i, from j to R, and from S to R has
// passed the decay of token t once: dg_t is the sum of these four, taken without differences of larger sums, which would
// leave nothing of a gradient as small as exp(-10). The last one needs S and R at a time: if the gradient is wanted, the
// forward pass keeps S of every chunk.
#include "cpu/kernels.h"

#include <memory>
#include <vector>

#include "cpu/lightning_chunk.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

struct BackwardScratch {
  int ldk, ldv;
  float* q;      // [C, Dk], scaled
  float* k;      // [C, Dk]
  float* v;      // [C, Dv]
  float* g;      // [C, Dv]: dO
  float* t1;     // [max(Dk, Dv), C]: a transpose
  float* t2;     // [max(Dk, Dv), C]: another
  float* a;      // [C, C]
  float* da;     // [C, C]
  float* rows;   // [C, max(Dk, Dv)]: a gradient as it is written
  float* grad;   // [Dk, C]: dQ or dK, transposed
  float* state;  // [Dk, Dv]: S, then R
  int64_t floats;

  BackwardScratch(int dk, int dv, float* memory) : ldk(pitch(dk)), ldv(pitch(dv)) {
    ScratchCarver carve(memory);
    const int most = std::max(padded(dk), padded(dv));
    q = carve.take(kChunk, ldk);
    k = carve.take(kChunk, ldk);
    v = carve.take(kChunk, ldv);
    g = carve.take(kChunk, ldv);
    t1 = carve.take(most, kTokenPitch);
    t2 = carve.take(most, kTokenPitch);
    a = carve.take(kChunk, kTokenPitch);
    da = carve.take(kChunk, kTokenPitch);
    rows = carve.take(kChunk, std::max(ldk, ldv));
    grad = carve.take(padded(dk), kTokenPitch);
    state = carve.take(dk, ldv);
    floats = carve.used();
  }
};

// m[r][c] *= factors[c]
inline void scale_columns(float* m, int rows, int columns, int ld, const float* factors) {
  for (int c = 0; c < columns; c += W) {
    const V factor = load(factors + c);
    for (int r = 0; r < rows; ++r) store(load(m + r * ld + c) * factor, m + r * ld + c);
  }
}

// Long sums are taken in pieces of this many products, and then of the pieces: the decays' gradient multiplies scores with
// their gradients, whose errors a single chain of adds would make three times as large.
constexpr int kPiece = 16;

// C = AB, every sum in pieces.
inline void multiply_in_pieces(const float* a, int lda, const float* b, int ldb, int rows, int cols, int depth,
                               float* c, int ldc) {
  multiply<Into::kSet>(a, lda, b, ldb, rows, cols, std::min(kPiece, depth), c, ldc);
  for (int d = kPiece; d < depth; d += kPiece) {
    multiply<Into::kAdd>(a + d, lda, b + d * ldb, ldb, rows, cols, std::min(kPiece, depth - d), c, ldc);
  }
}

// out[c] = sum over r of a[r][c] * b[r][c]
inline void dot_columns(const float* a, const float* b, int rows, int columns, int ld, float* out) {
  for (int c = 0; c < columns; c += W) {
    V sum = 0.0f;
    for (int first = 0; first < rows; first += kPiece) {
      V piece = 0.0f;
      for (int r = first; r < std::min(first + kPiece, rows); ++r) piece += load(a + r * ld + c) * load(b + r * ld + c);
      sum += piece;
    }
    store(sum, out + c);
  }
}

template <class T>
class Backward {
 public:
  Backward(const LightningBackwardArgs& args, const LightningItem& item, float* scratch, double* decay_sum)
      : args_(args), item_(item), dk_(static_cast<int>(args.q.shape[3])), dv_(static_cast<int>(args.v.shape[3])),
        scale_(static_cast<float>(args.scale)), wants_decay_(args.grad_log_decay.has_value()), decay_sum_(decay_sum),
        q_(args.q, item), k_(args.k, item), v_(args.v, item), g_(args.grad_out, item), grad_q_(args.grad_q, item),
        grad_k_(args.grad_k, item), grad_v_(args.grad_v, item), decay_(args.log_decay, item), m_(dk_, dv_, scratch) {}

  void run() {
    const int64_t n = item_.num_tokens, chunks = (n + kChunk - 1) / kChunk;
    if (wants_decay_) {
      from_past_.resize(static_cast<size_t>(chunks * kChunk));
      states_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(chunks * state_floats()));
    }
    start_state(args_.initial_state);
    for (int64_t c = 0; c < chunks; ++c) forward(c, tokens_of(c));
    start_state(args_.grad_final_state);
    for (int64_t c = chunks; c-- > 0;) reverse(c, tokens_of(c));
    if (!args_.grad_initial_state) return;
    const StateRows to(*args_.grad_initial_state, item_.sequence, item_.head);
    for (int d = 0; d < dk_; ++d) store_row(m_.state + d * m_.ldv, dv_, to.data + d * to.stride);
  }

 private:
  int tokens_of(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kChunk, item_.num_tokens - chunk * kChunk));
  }
  int64_t state_floats() const { return int64_t{dk_} * m_.ldv; }

  void start_state(const std::optional<Tensor>& from) {
    std::fill_n(m_.state, state_floats(), 0.0f);
    if (!from) return;
    const StateRows rows(*from, item_.sequence, item_.head);
    for (int d = 0; d < dk_; ++d) load_row(rows.data + d * rows.stride, dv_, m_.state + d * m_.ldv);
  }

  // dQ, and the state after the chunk.
  void forward(int64_t chunk, int tokens) {
    const int64_t first = chunk * kChunk;
    load_rows(k_, first, item_.num_tokens, tokens, 0, dk_, m_.k, m_.ldk);
    load_rows(v_, first, item_.num_tokens, tokens, 0, dv_, m_.v, m_.ldv);
    load_rows(g_, first, item_.num_tokens, tokens, 0, dv_, m_.g, m_.ldv);
    decay_.start(first, tokens);
    float *gt = m_.t1, *dat = m_.da;
    transpose(m_.g, m_.ldv, tokens, dv_, gt, kTokenPitch);

    // dA^T, rows j, lanes i >= j.
    for (int j = 0; j < tokens; j += kBlockRows) {
      const int rows = std::min(kBlockRows, tokens - j), from = j / kPanelWidth * kPanelWidth;
      multiply_in_pieces(m_.v + j * m_.ldv, m_.ldv, gt + from, kTokenPitch, rows, kChunk - from, dv_,
                         dat + j * kTokenPitch + from, kTokenPitch);
    }
    for (int j = 0; j < tokens; ++j) {
      float* row = dat + j * kTokenPitch;
      for (int i = 0; i < kChunk; i += W) {
        V x = load(row + i) * decay_.from_token(j, i) * scale_;
        stdx::where(lanes_ < static_cast<float>(j - i) || lanes_ >= static_cast<float>(tokens - i), x) = 0.0f;
        store(x, row + i);
      }
    }

    // The part of the past first: its product with q is what the decays' gradient wants.
    float factors[kChunk];
    for (int i = 0; i < kChunk; ++i) factors[i] = scale_ * decay_.since_start()[i];
    scale_columns(gt, dv_, kChunk, kTokenPitch, factors);
    multiply_in_pieces(m_.state, m_.ldv, gt, kTokenPitch, dk_, kChunk, dv_, m_.grad, kTokenPitch);
    if (wants_decay_) {
      load_rows(q_, first, item_.num_tokens, tokens, 0, dk_, m_.q, m_.ldk);
      transpose(m_.q, m_.ldk, tokens, dk_, m_.t2, kTokenPitch);
      dot_columns(m_.t2, m_.grad, dk_, kChunk, kTokenPitch, from_past_.data() + first);
      std::copy_n(m_.state, state_floats(), states_.get() + chunk * state_floats());
    }
    for (int p = 0; p < tokens; p += kPanelWidth) {
      multiply<Into::kAdd, true>(m_.k, m_.ldk, dat + p, kTokenPitch, dk_, kPanelWidth,
                                 std::min(p + kPanelWidth, tokens), m_.grad + p, kTokenPitch);
    }
    write(m_.grad, first, tokens, grad_q_);

    for (int j = 0; j < tokens; ++j) scale_row(m_.k + j * m_.ldk, dk_, decay_.to_end()[j]);
    multiply<Into::kScaleAdd, true>(m_.k, m_.ldk, m_.v, m_.ldv, dk_, dv_, tokens, m_.state, m_.ldv, decay_.whole());
  }

  // dK, dV, the decays' gradient, and R before the chunk.
  void reverse(int64_t chunk, int tokens) {
    const int64_t first = chunk * kChunk;
    load_rows(q_, first, 0, tokens, 0, dk_, m_.q, m_.ldk);
    load_rows(k_, first, 0, tokens, 0, dk_, m_.k, m_.ldk);
    load_rows(v_, first, 0, tokens, 0, dv_, m_.v, m_.ldv);
    load_rows(g_, first, 0, tokens, 0, dv_, m_.g, m_.ldv);
    for (int i = 0; i < tokens; ++i) scale_row(m_.q + i * m_.ldk, dk_, scale_);
    decay_.start(first, tokens);
    float *kt = m_.t1, *vt = m_.t2;
    transpose(m_.k, m_.ldk, tokens, dk_, kt, kTokenPitch);
    transpose(m_.v, m_.ldv, tokens, dv_, vt, kTokenPitch);

    // A and dA (without scale, which q has), rows i, lanes j <= i.
    for (int i = 0; i < tokens; i += kBlockRows) {
      const int rows = std::min(kBlockRows, tokens - i), at = i * kTokenPitch;
      multiply_in_pieces(m_.q + i * m_.ldk, m_.ldk, kt, kTokenPitch, rows, i + rows, dk_, m_.a + at, kTokenPitch);
      multiply_in_pieces(m_.g + i * m_.ldv, m_.ldv, vt, kTokenPitch, rows, i + rows, dv_, m_.da + at, kTokenPitch);
    }
    float crossing[kChunk], pairs[kChunk] = {};
    for (int i = tokens; i-- > 0;) crossing[i] = weigh(i, pairs);

    // dV
    for (int j = 0; j < tokens; j += kBlockRows) {
      const int rows = std::min(kBlockRows, tokens - j);
      multiply<Into::kSet, true>(m_.a + j * kTokenPitch + j, kTokenPitch, m_.g + j * m_.ldv, m_.ldv, rows, dv_,
                                 tokens - j, m_.rows + j * m_.ldv, m_.ldv);
    }
    for (int j = 0; j < tokens; ++j) scale_row(m_.k + j * m_.ldk, dk_, decay_.to_end()[j]);
    multiply<Into::kAdd>(m_.k, m_.ldk, m_.state, m_.ldv, tokens, dv_, dk_, m_.rows, m_.ldv);
    for (int j = 0; j < tokens; ++j) store_row(m_.rows + j * m_.ldv, dv_, grad_v_.row(first + j));

    // dK, the part of the future first.
    scale_columns(vt, dv_, kChunk, kTokenPitch, decay_.to_end());
    multiply_in_pieces(m_.state, m_.ldv, vt, kTokenPitch, dk_, kChunk, dv_, m_.grad, kTokenPitch);
    if (wants_decay_) {
      float to_future[kChunk];
      dot_columns(kt, m_.grad, dk_, kChunk, kTokenPitch, to_future);
      write_decays(chunk, tokens, crossing, to_future);
    }
    for (int p = 0; p < tokens; p += kPanelWidth) {
      multiply<Into::kAdd, true>(m_.q + p * m_.ldk, m_.ldk, m_.da + p * kTokenPitch + p, kTokenPitch, dk_, kPanelWidth,
                                 tokens - p, m_.grad + p, kTokenPitch);
    }
    write(m_.grad, first, tokens, grad_k_);

    for (int i = 0; i < tokens; ++i) scale_row(m_.q + i * m_.ldk, dk_, decay_.since_start()[i]);
    multiply<Into::kScaleAdd, true>(m_.q, m_.ldk, m_.g, m_.ldv, dk_, dv_, tokens, m_.state, m_.ldv, decay_.whole());
  }

  // Row i of A and dA times its decays, 0 past the diagonal. Rows go from the last to the first: pairs[j] is the sum over
  // the rows so far of A_ij dA_ij, so that the sum of pairs[j] over j < i, which it returns, is of all that crosses from
  // before token i to it or after it.
  float weigh(int i, float* pairs) {
    float *a = m_.a + i * kTokenPitch, *da = m_.da + i * kTokenPitch;
    V crossing = 0.0f;
    for (int j = 0; j < kChunk; j += W) {
      V x = 0.0f, dx = 0.0f;
      if (j <= i) {
        const auto later = lanes_ > static_cast<float>(i - j);
        const V decay = decay_.to_token(i, j);
        x = load(a + j) * decay;
        dx = load(da + j);
        V pair = x * dx;
        stdx::where(later, pair) = 0.0f;
        pair += load(pairs + j);
        store(pair, pairs + j);
        stdx::where(lanes_ >= static_cast<float>(i - j), pair) = 0.0f;
        crossing += pair;
        dx *= decay;
        stdx::where(later, x) = 0.0f;
        stdx::where(later, dx) = 0.0f;
      }
      store(x, a + j);
      store(dx, da + j);
    }
    float sums[4];
    sum_lanes(crossing, crossing, crossing, crossing, sums);
    return sums[0];
  }

  void write_decays(int64_t chunk, int tokens, const float* crossing, const float* to_future) {
    const int64_t first = chunk * kChunk;
    double from_start = static_cast<double>(decay_.whole()) * dot(states_.get() + chunk * state_floats(), m_.state);
    double sums[kChunk], after = 0.0;
    for (int t = tokens - 1; t >= 0; --t) {
      after += static_cast<double>(from_past_[static_cast<size_t>(first + t)]);
      sums[t] = after + static_cast<double>(crossing[t]);
    }
    for (int t = 0; t < tokens; ++t) {
      const double grad = sums[t] + from_start;
      from_start += static_cast<double>(to_future[t]);
      if (decay_sum_ != nullptr) {
        *decay_sum_ += grad;
      } else {
        const Tensor& to = *args_.grad_log_decay;
        to.ptr<float>()[item_.batch * to.stride[0] + (item_.token + first + t) * to.stride[1] +
                        item_.head * to.stride[2]] = static_cast<float>(grad);
      }
    }
  }

  // <a, b> of two states.
  double dot(const float* a, const float* b) const {
    double sum = 0.0;
    for (int d = 0; d < dk_; ++d) {
      V row = 0.0f;
      for (int c = 0; c < dv_; c += W) {
        const V product = load(a + d * m_.ldv + c) * load(b + d * m_.ldv + c);
        if (c + W <= dv_) {
          row += product;
        } else {
          V kept = product;
          stdx::where(lanes_ >= static_cast<float>(dv_ - c), kept) = 0.0f;
          row += kept;
        }
      }
      float sums[4];
      sum_lanes(row, row, row, row, sums);
      sum += static_cast<double>(sums[0]);
    }
    return sum;
  }

  // Rows of a gradient from its transpose [Dk, C].
  void write(const float* from, int64_t first, int tokens, const HeadRows<T>& to) {
    transpose(from, kTokenPitch, dk_, tokens, m_.rows, m_.ldk);
    for (int i = 0; i < tokens; ++i) store_row(m_.rows + i * m_.ldk, dk_, to.row(first + i));
  }

  const LightningBackwardArgs& args_;
  const LightningItem& item_;
  int dk_, dv_;
  float scale_;
  bool wants_decay_;
  double* decay_sum_;
  HeadRows<const T> q_, k_, v_, g_;
  HeadRows<T> grad_q_, grad_k_, grad_v_;
  ChunkDecay decay_;
  BackwardScratch m_;
  std::vector<float> from_past_;     // of each token: q . (its part of dQ from the chunk's first state)
  std::unique_ptr<float[]> states_;  // before each chunk
  const V lanes_ = lane_numbers();
};

}  // namespace

int64_t lightning_backward_scratch_floats(int dk, int dv) { return BackwardScratch(dk, dv, nullptr).floats; }

void lightning_backward(const LightningBackwardArgs& args, const LightningItem& item, float* scratch,
                        double* decay_sum) {
  by_dtype(args.q.dtype, [&](auto type) { Backward<decltype(type)>(args, item, scratch, decay_sum).run(); });
}

}  // namespace kvk::cpu::KVK_LEVEL
