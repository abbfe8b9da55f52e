// Score: what happens to s = scale * q.k before the softmax, in the order of docs/conventions.md: soft cap, ALiBi, key
// bias, then the masks. A key whose score ends at -inf is not seen.
#pragma once

#include <algorithm>

#include "core/paged_problem.h"
#include "cpu/engine/schedule.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

// Scores of the keys whose bit is 0 become -inf.
inline void hide_unseen(uint64_t seen, int vectors, float* s) {
  static_assert(kBlockKeys == 64);
  constexpr uint32_t kAll = (uint32_t{1} << W) - 1;
  const VU32 lane([](int i) { return uint32_t{1} << i; });
  for (int i = 0; i < vectors; ++i, seen >>= W) {
    const uint32_t bits = static_cast<uint32_t>(seen) & kAll;
    if (bits == kAll) continue;
    VU32 x = bit_cast<VU32>(load(s + i * W));
    stdx::where((lane & VU32(bits)) == 0u, x) = bit_cast<uint32_t>(-kInf);
    store(bit_cast<V>(x), s + i * W);
  }
}

class Score {
 public:
  Score(const PagedProblem& problem, const Tile& tile) : p_(problem), tile_(tile) {}

  // Whether every row sees the whole block, in whole vectors, and its scores are scale * q.k and nothing more.
  bool plain(const KeyBlock& block) const {
    if (p_.logits_soft_cap > 0.0f || p_.alibi_slopes != nullptr || p_.key_bias != nullptr) return false;
    const int64_t end = block.first + block.count;
    if (block.count % W != 0 || (p_.causal && end > tile_.first_query + 1)) return false;
    if (p_.window_left >= 0 && block.first < tile_.first_query + tile_.num_tokens - 1 - p_.window_left) return false;
    return p_.mask_bits == nullptr || end <= tile_.len - tile_.mask_width;
  }

  // q.k of one kv head over one block, s [rows, kBlockKeys], to scores; rows ordered (token, head of the group). Fills the padding
  // up to a whole vector with -inf.
  void apply(const KeyBlock& block, int head, float* s) const {
    alignas(64) float bias[kBlockKeys];
    if (p_.key_bias != nullptr) gather_bias(block, head, bias);
    const int vectors = (block.count + W - 1) / W;
    for (int t = 0; t < tile_.num_tokens; ++t) {
      const int64_t query = tile_.first_query + t;
      // Keys [begin, end) of the block are visible to this token as far as causality and window go.
      const int begin = p_.window_left >= 0 ? clamp(query - p_.window_left - block.first, block.count) : 0;
      const int end = p_.causal ? clamp(query + 1 - block.first, block.count) : block.count;
      const bool bits = p_.mask_bits != nullptr && block.first + block.count > tile_.len - tile_.mask_width;
      for (int g = 0; g < p_.group; ++g) {
        float* row = s + (t * p_.group + g) * kBlockKeys;
        transform(row, vectors, block, query, head * p_.group + g, bias);
        std::fill(row, row + std::min(begin, end), -kInf);
        std::fill(row + end, row + vectors * W, -kInf);
        if (bits) hide(row, block, tile_.token + t);
      }
    }
  }

 private:
  static int clamp(int64_t x, int count) { return static_cast<int>(std::clamp<int64_t>(x, 0, count)); }

  void gather_bias(const KeyBlock& block, int head, float* bias) const {
    for (int i = 0; i < block.num_runs; ++i) {
      const Run& run = block.runs[i];
      const float* from = p_.key_bias + p_.bias_row(run.page) * p_.bias_page_stride +
                          run.offset * p_.bias_token_stride + head * p_.bias_head_stride;
      for (int j = 0; j < run.count; ++j) bias[run.begin + j] = from[j * p_.bias_token_stride];
    }
    std::fill(bias + block.count, bias + kBlockKeys, 0.0f);
  }

  void transform(float* row, int vectors, const KeyBlock& block, int64_t query, int q_head, const float* bias) const {
    // The finished product is scaled, once: a scaled query would round every one of its elements.
    for (int i = 0; i < vectors; ++i) store(load(row + i * W) * p_.softmax_scale, row + i * W);
    const float cap = p_.logits_soft_cap;
    if (cap > 0.0f) {
      for (int i = 0; i < vectors; ++i) store(tanh(load(row + i * W) / cap) * cap, row + i * W);
    }
    if (p_.alibi_slopes != nullptr) {
      const float slope = p_.alibi_slopes[q_head * p_.alibi_stride];
      const V lane([](int i) { return static_cast<float>(i); });
      for (int i = 0; i < vectors; ++i) {
        V distance = lane + static_cast<float>(block.first + i * W - query);
        stdx::where(distance < 0.0f, distance) = -distance;
        store(load(row + i * W) - distance * slope, row + i * W);
      }
    }
    if (p_.key_bias != nullptr) {
      for (int i = 0; i < vectors; ++i) store(load(row + i * W) + load(bias + i * W), row + i * W);
    }
  }

  void hide(float* row, const KeyBlock& block, int64_t token) const {
    const uint32_t* words = p_.mask_bits + token * p_.mask_token_stride;
    const int64_t base = tile_.len - tile_.mask_width;
    for (int64_t j = std::max<int64_t>(0, base - block.first); j < block.count; ++j) {
      const int64_t bit = block.first + j - base;
      if ((words[bit / 32 * p_.mask_word_stride] >> (bit % 32) & 1) == 0) row[j] = -kInf;
    }
  }

  const PagedProblem& p_;
  const Tile& tile_;
};

}  // namespace kvk::cpu::KVK_LEVEL
