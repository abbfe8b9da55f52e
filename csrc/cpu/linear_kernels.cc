// Normalised linear attention and the Taylor feature map at one instruction-set level, one head of one sequence or one row
// at a time.
//
// The forward pass is the sum of linear_pass.h over (q, k, v). With G = dO / (den + eps), the gradient is the same sum three
// times: dq over (G, v, k) and, from the last token to the first, so that j are the tokens that see i, dk over (v, G, q) and
// dv over (k, q, G).
// FLOPs a token and head: 2 C (Dk + Dv) + 4 Dk Dv for blocks of up to C / 2 tokens, 4 Dk Dv for the others; the gradient three
// times that: a fifth more than passes that share their scores and states. Bound by FMA.
#include "cpu/kernels.h"

#include <cmath>
#include <vector>

#include "cpu/linear_pass.h"
#include "cpu/row_walk.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

// One head's z of a [N, H, Dk] tensor.
float* z_of(const std::optional<Tensor>& t, const LightningItem& item) {
  return t ? t->ptr<float>() + item.sequence * t->stride[0] + item.head * t->stride[1] : nullptr;
}

// Columns of a state into m.s, or zeros.
void load_state(const std::optional<Tensor>& t, const LightningItem& item, int begin, int rows, int columns,
                const LinearScratch& m) {
  if (!t) return void(std::fill_n(m.s, int64_t{rows} * m.ld, 0.0f));
  const StateRows from(*t, item.sequence, item.head);
  for (int d = 0; d < rows; ++d) load_row(from.data + d * from.stride + begin, columns, m.s + d * m.ld);
}

void load_transposed(const std::optional<Tensor>& t, const LightningItem& item, int rows, int columns,
                     const LinearScratch& m) {
  std::fill_n(m.s, int64_t{columns} * m.ld, 0.0f);
  if (!t) return;
  const StateRows from(*t, item.sequence, item.head);
  for (int d = 0; d < rows; ++d) {
    for (int c = 0; c < columns; ++c) m.s[c * m.ld + d] = from.data[d * from.stride + c];
  }
}

void store_state(const Tensor& t, const LightningItem& item, int begin, int rows, int columns, const LinearScratch& m) {
  const StateRows to(t, item.sequence, item.head);
  for (int d = 0; d < rows; ++d) store_row(m.s + d * m.ld, columns, to.data + d * to.stride + begin);
}

class Forward final : public Results {
 public:
  Forward(const LinearAttentionArgs& args, const LightningItem& item, float* scratch)
      : args_(args), item_(item), dk_(static_cast<int>(args.q.shape[3])), dv_(item.v_end - item.v_begin),
        scale_(static_cast<float>(args.scale)), q_(args.q, item, false), k_(args.k, item, false),
        v_(args.v, item, false), q_den_(args.q_den.value_or(args.q), item, false),
        k_den_(args.k_den.value_or(args.k), item, false), out_(args.out, item, false), den_(args.den, item),
        m_(dk_, static_cast<int>(args.v.shape[3]), scratch), z_(k_den_, dk_, m_) {}

  void run() {
    load_state(args_.initial_state, item_, item_.v_begin, dk_, dv_, m_);
    z_.start(z_of(args_.initial_z, item_), nullptr);
    sum_over_seen({q_, dk_, 0, scale_}, {k_, dk_}, {v_, dv_, item_.v_begin}, blocks_of(args_, item_.num_tokens, false),
                  m_, *this);
    store_state(args_.final_state, item_, item_.v_begin, dk_, dv_, m_);
    if (item_.v_begin == 0) store_row(z_.total(), dk_, z_of(args_.final_z, item_));
  }

  void begin(const Group& group) override { z_.add(group); }

  void row(const Group& group, int64_t i, float* sums) override {
    float* q = m_.vector(3);
    q_den_.load(group.first + i, 0, dk_, q);
    const float den = scale_ * dot(q, z_.seen(group, i), dk_);
    if (item_.v_begin == 0) den_[group.first + i] = den;  // other columns' items find the same
    if (args_.normalize) divide(sums, dv_, den + static_cast<float>(args_.eps));
    out_.store(sums, group.first + i, item_.v_begin, dv_);
  }

 private:
  static void divide(float* row, int n, float by) {
    for (int d = 0; d < n; d += W) store(load(row + d) / by, row + d);
  }

  const LinearAttentionArgs& args_;
  const LightningItem& item_;
  int dk_, dv_;
  float scale_;
  TokenRows q_, k_, v_, q_den_, k_den_, out_;
  TokenFloats den_;
  LinearScratch m_;
  VectorState z_;
};

// The factors that the gradient's passes hand on, a float a token: of dO in G, and of q_den in the gradient of z.
struct Factors {
  std::vector<float> out, den;
};

// dq and dq_den, from the first token to the last. With g the gradient of den_i:
//   g = d den_i - dO . out_i / (den_i + eps) = d den_i - (q_i . dq_i) / (den_i + eps),      dq_den_i = scale * g * z_i
class QueryGradient final : public Results {
 public:
  QueryGradient(const LinearAttentionBackwardArgs& args, const LightningItem& item, const LinearScratch& m,
                Factors& factors)
      : args_(args), in_(args.forward), item_(item), dk_(static_cast<int>(in_.q.shape[3])),
        dv_(static_cast<int>(in_.v.shape[3])), scale_(static_cast<float>(in_.scale)), q_(in_.q, item, false),
        k_(in_.k, item, false), v_(in_.v, item, false), q_den_(in_.q_den.value_or(in_.q), item, false),
        k_den_(in_.k_den.value_or(in_.k), item, false), grad_out_(args.grad_out, item, false),
        grad_q_(args.grad_q, item, false), grad_q_den_(args.grad_q_den.value_or(args.grad_q), item, false), m_(m),
        factors_(factors), z_(k_den_, dk_, m_) {}

  void run() {
    load_transposed(in_.initial_state, item_, dk_, dv_, m_);
    z_.start(z_of(in_.initial_z, item_), nullptr);
    sum_over_seen({grad_out_, dv_, 0, scale_}, {v_, dv_}, {k_, dk_}, blocks_of(in_, item_.num_tokens, false), m_,
                  *this);
  }

  void begin(const Group& group) override { z_.add(group); }

  void row(const Group& group, int64_t i, float* sums) override {
    const int64_t t = group.first + i;
    const float* z = z_.seen(group, i);
    float *q = m_.vector(3), *spare = m_.vector(4);
    float grad = args_.grad_den ? TokenFloats(*args_.grad_den, item_)[t] : 0.0f, factor = 1.0f;
    if (in_.normalize) {
      q_den_.load(t, 0, dk_, q);
      factor = 1.0f / (scale_ * dot(q, z, dk_) + static_cast<float>(in_.eps));
      scale_row(sums, dk_, factor);
      q_.load(t, 0, dk_, q);
      grad -= dot(q, sums, dk_) * factor;
    }
    factors_.out[static_cast<size_t>(t)] = scale_ * factor;
    factors_.den[static_cast<size_t>(t)] = scale_ * grad;
    float* to = args_.grad_q_den ? spare : sums;
    const V start = args_.grad_q_den ? 0.0f : 1.0f, g = scale_ * grad;
    for (int d = 0; d < dk_; d += W) store(load(sums + d) * start + load(z + d) * g, to + d);
    if (args_.grad_q_den) grad_q_den_.store(spare, t, 0, dk_);
    grad_q_.store(sums, t, 0, dk_);
  }

 private:
  const LinearAttentionBackwardArgs& args_;
  const LinearAttentionArgs& in_;
  const LightningItem& item_;
  int dk_, dv_;
  float scale_;
  TokenRows q_, k_, v_, q_den_, k_den_, grad_out_, grad_q_, grad_q_den_;
  const LinearScratch& m_;
  Factors& factors_;
  VectorState z_;
};

// dk and dk_den, then dv, from the last token to the first.
class KeyGradients final {
 public:
  KeyGradients(const LinearAttentionBackwardArgs& args, const LightningItem& item, const LinearScratch& m,
               const Factors& factors)
      : args_(args), in_(args.forward), item_(item), dk_(static_cast<int>(in_.q.shape[3])),
        dv_(static_cast<int>(in_.v.shape[3])), q_(in_.q, item, true), k_(in_.k, item, true), v_(in_.v, item, true),
        q_den_(in_.q_den.value_or(in_.q), item, true), grad_out_(args.grad_out, item, true), m_(m), factors_(factors) {}

  void run() {
    const Blocks blocks = blocks_of(in_, item_.num_tokens, true);
    Keys keys(*this);
    load_transposed(args_.grad_final_state, item_, dk_, dv_, m_);
    keys.z.start(z_of(args_.grad_final_z, item_), factors_.den.data());
    const Operand weighted = {grad_out_, dv_, 0, 1.0f, factors_.out.data()};
    sum_over_seen({v_, dv_}, weighted, {q_, dk_}, blocks, m_, keys);
    if (args_.grad_initial_z) store_row(keys.z.total(), dk_, z_of(args_.grad_initial_z, item_));

    Values values(*this);
    load_state(args_.grad_final_state, item_, 0, dk_, dv_, m_);
    sum_over_seen({k_, dk_}, {q_, dk_}, weighted, blocks, m_, values);
    if (args_.grad_initial_state) store_state(*args_.grad_initial_state, item_, 0, dk_, dv_, m_);
  }

 private:
  struct Keys final : Results {
    const KeyGradients& pass;
    TokenRows grad_k, grad_k_den;
    VectorState z;

    explicit Keys(const KeyGradients& p)
        : pass(p), grad_k(p.args_.grad_k, p.item_, true),
          grad_k_den(p.args_.grad_k_den.value_or(p.args_.grad_k), p.item_, true), z(p.q_den_, p.dk_, p.m_) {}
    void begin(const Group& group) override { z.add(group); }
    void row(const Group& group, int64_t i, float* sums) override {
      const float* seen = z.seen(group, i);
      if (pass.args_.grad_k_den) {
        grad_k_den.store(seen, group.first + i, 0, pass.dk_);
      } else {
        for (int d = 0; d < pass.dk_; d += W) store(load(sums + d) + load(seen + d), sums + d);
      }
      grad_k.store(sums, group.first + i, 0, pass.dk_);
    }
  };
  struct Values final : Results {
    int dv;
    TokenRows grad_v;

    explicit Values(const KeyGradients& p) : dv(p.dv_), grad_v(p.args_.grad_v, p.item_, true) {}
    void row(const Group& group, int64_t i, float* sums) override { grad_v.store(sums, group.first + i, 0, dv); }
  };

  const LinearAttentionBackwardArgs& args_;
  const LinearAttentionArgs& in_;
  const LightningItem& item_;
  int dk_, dv_;
  TokenRows q_, k_, v_, q_den_, grad_out_;
  const LinearScratch& m_;
  const Factors& factors_;
};

// Based's feature map is bound by the bytes of the features. Row i of the triangle is one product of x_i with the row's tail,
// and so is its gradient.
constexpr int kMostTaylor = padded(static_cast<int>(kMaxTaylorDim));

struct TaylorFactors {
  float linear, product, square;

  explicit TaylorFactors(int d)
      : linear(static_cast<float>(1.0 / std::sqrt(std::sqrt(d)))), product(static_cast<float>(1.0 / std::sqrt(d))),
        square(static_cast<float>(1.0 / std::sqrt(2.0 * d))) {}
};

// to[0..n) = from[0..n) * factor; up to a vector more is written.
inline void scaled(const float* from, int n, float factor, float* to) {
  for (int c = 0; c < n; c += W) store(load(from + c) * factor, to + c);
}

// out has room for a vector more; what a row writes too much the next one covers.
void features(const float* x, int d, const TaylorFactors& factors, float* out) {
  out[0] = 1.0f;
  scaled(x, d, factors.linear, out + 1);
  float* to = out + 1 + d;
  for (int i = 0; i < d; to += d - i, ++i) {
    to[0] = x[i] * x[i] * factors.square;
    scaled(x + i + 1, d - i - 1, x[i] * factors.product, to + 1);
  }
}

// grad_x[i] = linear * g_i + 2 * square * x_i g_ii + product * sum over the others j of x_j g_ij
void gradient(const float* grad, const float* x, int d, const TaylorFactors& factors, float* grad_x) {
  alignas(64) float row[kMostTaylor + W];
  load_row(grad + 1, d, grad_x);
  scale_row(grad_x, d, factors.linear);
  const float* from = grad + 1 + d;
  for (int i = 0; i < d; from += d - i, ++i) {
    const int n = d - i - 1;
    load_row(from + 1, n, row);
    const V own = x[i] * factors.product;
    V sum = 0.0f;
    for (int c = 0; c < n; c += W) {
      const V g = load(row + c);  // 0 past the row
      sum += g * load(x + i + 1 + c);
      store(load(grad_x + i + 1 + c) + g * own, grad_x + i + 1 + c);
    }
    float sums[4];
    sum_lanes(sum, sum, sum, sum, sums);
    grad_x[i] += factors.product * sums[0] + 2.0f * factors.square * x[i] * from[0];
  }
}

}  // namespace

int64_t linear_scratch_floats(int dk, int dv) { return LinearScratch(dk, dv, nullptr).floats; }

void linear_forward(const LinearAttentionArgs& args, const LightningItem& item, float* scratch) {
  Forward(args, item, scratch).run();
}

void linear_backward(const LinearAttentionBackwardArgs& args, const LightningItem& item, float* scratch) {
  const LinearScratch m(static_cast<int>(args.forward.q.shape[3]), static_cast<int>(args.forward.v.shape[3]), scratch);
  const auto tokens = static_cast<size_t>(item.num_tokens);
  Factors factors = {std::vector<float>(tokens), std::vector<float>(tokens)};
  QueryGradient(args, item, m, factors).run();
  std::reverse(factors.out.begin(), factors.out.end());
  std::reverse(factors.den.begin(), factors.den.end());
  KeyGradients(args, item, m, factors).run();
}

void taylor_feature_map(const TaylorFeatureMapArgs& args, int64_t begin, int64_t end) {
  const int d = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const TaylorFactors factors(d);
  by_dtype(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float x[kMostTaylor + W] = {};
    const int count = static_cast<int>(taylor_features(d));
    std::vector<float> row(static_cast<size_t>(count + W));
    RowWalk from(args.x, begin), to(args.out, begin);
    for (int64_t r = begin; r < end; ++r, from.next(), to.next()) {
      load_row(args.x.ptr<const T>() + from.offset(), d, x);
      features(x, d, factors, row.data());
      store_row(row.data(), count, args.out.ptr<T>() + to.offset());
    }
  });
}

void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs& args, int64_t begin, int64_t end) {
  const int d = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const TaylorFactors factors(d);
  by_dtype(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float x[kMostTaylor + W] = {}, grad_x[kMostTaylor + W] = {};
    const int count = static_cast<int>(taylor_features(d));
    std::vector<float> row(static_cast<size_t>(count + W));
    RowWalk from(args.x, begin), grad(args.grad, begin), to(args.grad_x, begin);
    for (int64_t r = begin; r < end; ++r, from.next(), grad.next(), to.next()) {
      load_row(args.x.ptr<const T>() + from.offset(), d, x);
      load_row(args.grad.ptr<const T>() + grad.offset(), count, row.data());
      gradient(row.data(), x, d, factors, grad_x);
      store_row(grad_x, d, args.grad_x.ptr<T>() + to.offset());
    }
  });
}

}  // namespace kvk::cpu::KVK_LEVEL
