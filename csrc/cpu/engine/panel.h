// One block of keys against many query rows of one kv head, in fp32 panels: the inner step of every panel tile, whatever
// schedule and format its keys come from.
#pragma once

#include <cmath>

#include "cpu/engine/gemm.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// The rows of one kv head in a worker's memory, padded to whole register blocks.
struct PanelRows {
  float* q;      // [padded, ldq]
  float* s;      // [padded, kBlockKeys] scores, then weights
  float* out;    // [padded, ldo] running output
  float* scale;  // [padded] factor of the running output in this block
  int ldq, ldo, rows, padded;
  int head_dim, head_dim_v;
  float* k_panels;
  float* v_panels;
};

// Lays parts out one after another from base (null: only counts), each on a line of its own.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class Part>
  void take(Part*& part, int64_t count) {
    if (base_ != nullptr) part = reinterpret_cast<Part*>(base_ + used_);
    used_ += (count * int64_t{sizeof(Part)} + 63) / 64 * 64;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The weight of a key that a row does not see: no sum of products gives it, and added it changes nothing.
inline bool is_unseen(float weight) { return weight == 0.0f && std::signbit(weight); }

// The rare block in which V holds NaN or infinities and some row does not see some key: 0 * NaN must not enter a row that
// does not read that key. element(j, d): V of key j.
template <class Element>
inline void accumulate_seen(const Element& element, int keys, const float* weights, const float* scale, int rows,
                            int dim, float* out, int ldo) {
  for (int r = 0; r < rows; ++r, weights += kBlockKeys, out += ldo) {
    for (int d = 0; d < dim; ++d) {
      float acc = out[d] * scale[r];
      for (int j = 0; j < keys; ++j) {
        if (!is_unseen(weights[j])) acc += weights[j] * element(j, d);
      }
      out[d] = acc;
    }
  }
}

// weigh(s): turns q.k into weights and sets scale; returns whether some row does not see some key.
template <class Format, class Weigh>
inline void attend_panel(const Format& format, const typename Format::Rows& keys, int head, const PanelRows& t,
                         Weigh&& weigh) {
  format.pack_k(keys, head, t.k_panels);
  multiply_scores(t.q, t.ldq, t.padded, t.k_panels, (keys.count + kPanelWidth - 1) / kPanelWidth, t.head_dim, t.s,
                  kBlockKeys);
  if (weigh(t.s) && !format.finite_v(keys, head)) {
    return accumulate_seen([&](int j, int d) { return format.v_element(keys, head, j, d); }, keys.count, t.s, t.scale,
                           t.rows, t.head_dim_v, t.out, t.ldo);
  }
  format.pack_v(keys, head, t.v_panels);
  multiply_values(t.s, t.padded, t.v_panels, (t.head_dim_v + kPanelWidth - 1) / kPanelWidth, keys.count, t.out, t.ldo,
                  t.scale);
}

}  // namespace kvk::cpu::KVK_LEVEL
