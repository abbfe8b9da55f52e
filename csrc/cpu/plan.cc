#include "cpu/plan.h"

#include <algorithm>

namespace kvk::cpu {
namespace {

// Bytes of K that a stream block should hold for all kv heads: while one block's K is multiplied its V is fetched into
// L2 and then the next block's K, so four such pieces must fit beside each other in 512 KiB.
constexpr int64_t kStreamBlockBytes = 128 * 1024;

// A panel tile takes as many heads as a page of memory holds: more would only make the worker's own memory larger.
constexpr int64_t kPageBytes = 4096;

int32_t stream_block_keys(const PagedProblem& problem) {
  if (problem.records != nullptr)
    return kBlockKeys;  // groups of tokens stay whole; heads_per_tile() keeps a block small
  const int64_t row_bytes =
      element_size(problem.dtype) * problem.num_kv_heads * std::max(problem.head_dim, problem.head_dim_v);
  int32_t keys = kBlockKeys;
  while (keys > 16 && keys * row_bytes > kStreamBlockBytes) keys /= 2;
  return keys;
}

class Planner {
 public:
  Planner(const PagedProblem& problem, int num_workers) : p_(problem), num_workers_(num_workers) {}

  Plan run() {
    plan_.block_keys = stream_block_keys(p_);
    stream_heads_ = heads_per_tile(p_.num_kv_heads, 1, kStreamSplit);
    const int64_t head_bytes = element_size(p_.dtype) * std::max(p_.head_dim, p_.head_dim_v);
    panel_heads_ =
        heads_per_tile(static_cast<int32_t>(std::clamp<int64_t>(kPageBytes / head_bytes, 1, p_.num_kv_heads)),
                       std::max(1, kPanelRows / p_.group), kPanelSplit);
    for (int32_t b = 0; b < p_.num_requests; ++b) request(b);
    return std::move(plan_);
  }

 private:
  // Heads that lie side by side in a token's row are walked together, at most `heads` of them, in memory order: each page
  // of memory is then met once, not once a head. Fewer when that would leave workers idle.
  int32_t heads_per_tile(int32_t heads, int64_t tile_tokens, int64_t split_len) const {
    if (p_.quant != nullptr && p_.quant->restored()) return p_.joint_heads;
    if (p_.list.per_head() || !heads_side_by_side(split_len == kStreamSplit)) return 1;
    if (p_.records != nullptr) {
      const int64_t head_bytes = std::max(p_.records->k_head_stride, p_.records->v_head_stride) * kBlockKeys /
                                 std::min<int64_t>(p_.page_size, kBlockKeys);
      heads = static_cast<int32_t>(std::clamp<int64_t>(kStreamBlockBytes / std::max<int64_t>(1, head_bytes), 1, heads));
    }
    int64_t items = 0;
    for (int32_t b = 0; b < p_.num_requests; ++b) {
      const int64_t keys = p_.list.len(b, 0);
      const int64_t seen = p_.window_left >= 0 ? std::min(keys, p_.window_left + tile_tokens) : keys;
      const int64_t tiles = (p_.num_request_tokens(b) + tile_tokens - 1) / tile_tokens;
      items += tiles * ((seen + split_len - 1) / split_len);
    }
    while (heads > 1 && items * ((p_.num_kv_heads + heads - 1) / heads) < 4 * num_workers_) heads = (heads + 1) / 2;
    return heads;
  }

  // A record holds one head, and the records of a page lie in a row; stream tiles alone walk them together.
  bool heads_side_by_side(bool stream) const {
    if (p_.records == nullptr) return p_.k.head_stride <= p_.k.token_stride && p_.v.head_stride <= p_.v.token_stride;
    return stream && p_.records->k_head_stride <= p_.records->k_page_stride &&
           p_.records->v_head_stride <= p_.records->v_page_stride;
  }

  void request(int32_t b) {
    const int64_t first = p_.first_token(b), n = p_.num_request_tokens(b);
    const int64_t tile_tokens = std::max(1, kPanelRows / p_.group);
    // The last tokens of a causal request see the most keys: they come first.
    for (int64_t begin = (n - 1) / tile_tokens * tile_tokens; n > 0 && begin >= 0; begin -= tile_tokens) {
      const int64_t tokens = std::min(tile_tokens, n - begin);
      const bool stream = tokens * p_.group <= kMaxStreamRows;
      const int32_t step = stream ? stream_heads_ : panel_heads_;
      for (int32_t h = 0; h < p_.num_kv_heads; h += step) {
        tile(b, h, std::min(p_.num_kv_heads, h + step), first, n, begin, tokens, stream);
      }
    }
  }

  void tile(int32_t b, int32_t head_begin, int32_t head_end, int64_t first, int64_t n, int64_t begin, int64_t tokens,
            bool stream) {
    Tile t = {};
    t.request = b;
    t.head_begin = head_begin;
    t.head_end = head_end;
    t.num_tokens = static_cast<int32_t>(tokens);
    t.token = first + begin;
    t.len = p_.list.len(b, head_begin);
    t.first_query = t.len - n + begin;
    t.mask_width = p_.mask_width >= 0 ? p_.mask_width : n;
    t.stream = stream;
    t.key_begin = p_.window_left >= 0 ? std::max<int64_t>(0, t.first_query - p_.window_left) : 0;
    t.key_end = p_.causal ? std::clamp<int64_t>(t.first_query + tokens, 0, t.len) : t.len;
    t.key_begin = std::min(t.key_begin, t.key_end);
    const int64_t split = t.split_len();
    t.num_splits =
        t.key_begin == t.key_end ? 1 : static_cast<int32_t>((t.key_end + split - 1) / split - t.key_begin / split);
    const int32_t rows = t.rows(p_.group);
    if (t.num_splits > 1) {
      t.partial = plan_.partial_rows;
      plan_.partial_rows += int64_t{rows} * t.num_splits;
    }
    const int32_t padded = t.padded_rows_per_head(p_.group);
    int32_t& most = stream ? plan_.max_stream_rows : plan_.max_panel_rows;
    most = std::max(most, padded * (head_end - head_begin));
    if (!stream) plan_.max_panel_rows_per_head = std::max(plan_.max_panel_rows_per_head, padded);
    const int32_t index = static_cast<int32_t>(plan_.tiles.size());
    plan_.tiles.push_back(t);
    for (int32_t s = 0; s < t.num_splits; ++s) plan_.items.push_back({index, s});
  }

  const PagedProblem& p_;
  const int num_workers_;
  int32_t stream_heads_ = 1, panel_heads_ = 1;
  Plan plan_;
};

}  // namespace

Plan make_plan(const PagedProblem& problem, int num_workers) { return Planner(problem, num_workers).run(); }

}  // namespace kvk::cpu
