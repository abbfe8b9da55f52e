// How one call of lightning attention is cut into work: an item is one head of one sequence, or some columns of its values.
#pragma once

#include <cstdint>

namespace kvk::cpu {

// Tokens of a chunk, counted from the sequence's start. Longer ones spend more on scores, shorter ones pass over the state
// more often.
inline constexpr int kLightningChunk = 64;
// Columns of v are cut at multiples of this: a multiple of every level's panel.
inline constexpr int kLightningColumns = 32;

struct LightningItem {
  int64_t sequence, batch, token, num_tokens, head;
  int32_t v_begin, v_end;  // columns of v; each is computed alike whichever others go along
};

}  // namespace kvk::cpu
