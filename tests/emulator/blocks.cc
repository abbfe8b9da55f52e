#include "emulator/blocks.h"

#include <algorithm>

namespace kvk::emu {

void BlockOrder::fence(FenceState& state, uint16_t thread, const uint32_t* clock, unsigned clock_words) {
  for (Acquired& acquired : state.pending) {
    acquired.thread = thread;
    acquired.clock = clock[thread];
    acquired_.push_back(acquired);
  }
  state.pending.clear();
  auto publication = std::make_shared<Publication>();
  publication->block = block_;
  publication->clocks.assign(clock, clock + clock_words);
  for (const Acquired& acquired : acquired_) {
    if (visible(acquired, thread, clock)) publication->inherited.push_back(acquired);
  }
  state.fenced = std::move(publication);
}

void BlockOrder::atomic(FenceState& state, const void* word, uint16_t thread) {
  SyncWord& sync = words_[word];
  if (!sync.published.empty()) state.pending.push_back({&sync, sync.published.size(), thread, 0});
  const bool is_new = state.fenced && (sync.published.empty() || sync.published.back() != state.fenced);
  if (is_new) sync.published.push_back(state.fenced);
}

bool BlockOrder::covers(const Acquired& acquired, const Step& step, std::vector<const SyncWord*>& seen) {
  if (std::find(seen.begin(), seen.end(), acquired.word) != seen.end()) return false;
  const auto& published = acquired.word->published;
  for (size_t i = 0; i < acquired.count; ++i) {
    if (published[i]->block == step.block && published[i]->clocks[step.thread] >= step.clock) return true;
  }
  seen.push_back(acquired.word);
  for (size_t i = 0; i < acquired.count; ++i) {
    for (const Acquired& earlier : published[i]->inherited) {
      if (covers(earlier, step, seen)) return true;
    }
  }
  return false;
}

bool BlockOrder::orders(const Step& step, uint16_t thread, const uint32_t* clock) const {
  std::vector<const SyncWord*> seen;
  for (const Acquired& acquired : acquired_) {
    if (!visible(acquired, thread, clock)) continue;
    seen.clear();
    if (covers(acquired, step, seen)) return true;
  }
  return false;
}

}  // namespace kvk::emu
