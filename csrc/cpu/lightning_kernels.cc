// Lightning linear attention at one instruction-set level: the chunked forward pass and the decode step.
//
// A chunk of C tokens with the state S before it (Lightning Attention-2's two parts; G as in lightning_chunk.h):
//   A = scale * Q K^T .* exp(G_i - G_j) for j <= i      out = A V + scale * exp(G_i) Q S
//   S = exp(G_last) S + (exp(G_last - G_j) K)^T V
// FLOPs a token and head: C (Dk + Dv) + 4 Dk Dv, with C = 64 at most a fifth over the recurrence; bytes: q, k, v, out once.
// Bound by FMA; all a chunk needs stays in L2. The decode step reads and writes the state once and is bound by memory.
#include "cpu/kernels.h"

#include "cpu/lightning_chunk.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

struct ForwardScratch {
  int ldk, ldv;
  float* q;    // [C, Dk], scaled; then decayed since the chunk's start
  float* k;    // [C, Dk]; then decayed to its end
  float* kt;   // [Dk, C]
  float* v;    // [C, Dv]
  float* a;    // [C, C]
  float* out;  // [C, Dv]
  float* s;    // [Dk, Dv]
  int64_t floats;

  ForwardScratch(int dk, int dv, float* memory) : ldk(pitch(dk)), ldv(pitch(dv)) {
    ScratchCarver carve(memory);
    q = carve.take(kChunk, ldk);
    k = carve.take(kChunk, ldk);
    kt = carve.take(padded(dk), kTokenPitch);
    v = carve.take(kChunk, ldv);
    a = carve.take(kChunk, kTokenPitch);
    out = carve.take(kChunk, ldv);
    s = carve.take(dk, ldv);
    floats = carve.used();
  }
};

template <class T>
class Forward {
 public:
  Forward(const LightningArgs& args, const LightningItem& item, float* scratch)
      : item_(item), dk_(static_cast<int>(args.q.shape[3])), dv_(item.v_end - item.v_begin),
        scale_(static_cast<float>(args.scale)), q_(args.q, item), k_(args.k, item), v_(args.v, item),
        out_(args.out, item), decay_(args.log_decay, item), final_(args.final_state, item.sequence, item.head),
        m_(dk_, dv_, scratch) {
    if (args.initial_state) initial_ = StateRows(*args.initial_state, item.sequence, item.head);
  }

  void run() {
    std::fill_n(m_.s, int64_t{dk_} * m_.ldv, 0.0f);
    if (initial_.data != nullptr) {
      for (int d = 0; d < dk_; ++d) {
        load_row(initial_.data + d * initial_.stride + item_.v_begin, dv_, m_.s + d * m_.ldv);
      }
    }
    for (int64_t first = 0; first < item_.num_tokens; first += kChunk) {
      chunk(first, static_cast<int>(std::min<int64_t>(kChunk, item_.num_tokens - first)));
    }
    for (int d = 0; d < dk_; ++d) {
      store_row(m_.s + d * m_.ldv, dv_, final_.data + d * final_.stride + item_.v_begin);
    }
  }

 private:
  void chunk(int64_t first, int tokens) {
    load_rows(q_, first, item_.num_tokens, tokens, 0, dk_, m_.q, m_.ldk);
    load_rows(k_, first, item_.num_tokens, tokens, 0, dk_, m_.k, m_.ldk);
    load_rows(v_, first, item_.num_tokens, tokens, item_.v_begin, dv_, m_.v, m_.ldv);
    for (int i = 0; i < tokens; ++i) scale_row(m_.q + i * m_.ldk, dk_, scale_);
    transpose(m_.k, m_.ldk, tokens, dk_, m_.kt, kTokenPitch);
    decay_.start(first, tokens);
    const auto end = [](int i) { return i + 1; };
    scores(m_.q, m_.ldk, m_.kt, tokens, dk_, m_.a, end, [&](int i, int j, V x) { return x * decay_.to_token(i, j); });
    weigh_values(m_.a, m_.v, m_.ldv, tokens, dv_, m_.out, end);
    // The past, by way of the state.
    for (int i = 0; i < tokens; ++i) scale_row(m_.q + i * m_.ldk, dk_, decay_.since_start()[i]);
    multiply<Into::kAdd>(m_.q, m_.ldk, m_.s, m_.ldv, tokens, dv_, dk_, m_.out, m_.ldv);
    for (int i = 0; i < tokens; ++i) store_row(m_.out + i * m_.ldv, dv_, out_.row(first + i) + item_.v_begin);

    for (int j = 0; j < tokens; ++j) scale_row(m_.k + j * m_.ldk, dk_, decay_.to_end()[j]);
    multiply<Into::kScaleAdd, true>(m_.k, m_.ldk, m_.v, m_.ldv, dk_, dv_, tokens, m_.s, m_.ldv, decay_.whole());
  }

  const LightningItem& item_;
  int dk_, dv_;
  float scale_;
  HeadRows<const T> q_, k_, v_;
  HeadRows<T> out_;
  ChunkDecay decay_;
  StateRows initial_, final_;
  ForwardScratch m_;
};

// S[d][c] = decay * S[d][c] + k[d] * v[c], out[c] = sum over d of q[d] * S[d][c]. Strictly in the order of memory, which
// the hardware fetches ahead: four rows at a time, with less to load and store again, take three times as long.
void decode_head(float* state, int64_t stride, int dk, int dv, float decay, const float* q, const float* k,
                 const float* v, float* out) {
  std::fill_n(out, padded(dv), 0.0f);
  for (int d = 0; d < dk; ++d) {
    float* s = state + d * stride;
    const V key = k[d], query = q[d];
    const auto step = [&](V before, int c) {
      const V x = before * decay + key * load(v + c);
      store(load(out + c) + x * query, out + c);
      return x;
    };
    int c = 0;
    for (; c + W <= dv; c += W) store(step(load(s + c), c), s + c);
    if (c < dv) store_partial(step(load_partial(s + c, dv - c), c), s + c, dv - c);
  }
}

template <class T>
void decode_rows(const LightningDecodeArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.q.shape[1];
  const int dk = static_cast<int>(a.q.shape[2]), dv = static_cast<int>(a.v.shape[2]);
  constexpr int kMost = padded(static_cast<int>(kMaxLightningDim));
  alignas(64) float q[kMost], k[kMost], v[kMost], out[kMost];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / heads, h = i % heads;
    T* to = a.out.ptr<T>() + b * a.out.stride[0] + h * a.out.stride[1];
    const int64_t slot = a.slots.ptr<const int32_t>()[b * a.slots.stride[0]];
    if (slot < 0) {
      std::fill_n(out, padded(dv), 0.0f);
      store_row(out, dv, to);
      continue;
    }
    load_row(a.q.ptr<const T>() + b * a.q.stride[0] + h * a.q.stride[1], dk, q);
    load_row(a.k.ptr<const T>() + b * a.k.stride[0] + h * a.k.stride[1], dk, k);
    load_row(a.v.ptr<const T>() + b * a.v.stride[0] + h * a.v.stride[1], dv, v);
    scale_row(q, dk, static_cast<float>(a.scale));
    float decay = 1.0f;
    if (a.log_decay) {
      const Tensor& log = *a.log_decay;
      const int64_t row = log.ndim == 2 ? b * log.stride[0] : 0;
      decay = std::exp(log.ptr<const float>()[row + h * log.stride[log.ndim - 1]]);
    }
    decode_head(a.state.ptr<float>() + slot * a.state.stride[0] + h * a.state.stride[1], a.state.stride[2], dk, dv,
                decay, q, k, v, out);
    store_row(out, dv, to);
  }
}

}  // namespace

int64_t lightning_scratch_floats(int dk, int dv) { return ForwardScratch(dk, dv, nullptr).floats; }

void lightning_forward(const LightningArgs& args, const LightningItem& item, float* scratch) {
  by_dtype(args.q.dtype, [&](auto type) { Forward<decltype(type)>(args, item, scratch).run(); });
}

void lightning_decode(const LightningDecodeArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.q.dtype, [&](auto type) { decode_rows<decltype(type)>(args, begin, end); });
}

}  // namespace kvk::cpu::KVK_LEVEL
