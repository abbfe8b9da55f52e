// Which accesses of other blocks a thread may rely on. Blocks of a launch are unordered, whatever order the emulator runs
// them in, except through memory as PTX's model says: a thread writes, fences (__threadfence), and updates a word
// atomically; another updates the same word later, fences, and reads.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator/checker.h"

namespace kvk::emu {

struct SyncWord;

// That thread `thread` has, at its step `clock`, taken over what the first `count` publications at `word` say.
struct Acquired {
  const SyncWord* word;
  size_t count;
  uint16_t thread;
  uint32_t clock;
};

// What a fence has made ready to be published: all steps of a block's threads up to `clocks`, and what it knew itself.
struct Publication {
  uint32_t block;
  Clock clocks;
  std::vector<Acquired> inherited;
};

// A word of memory that is updated atomically.
struct SyncWord {
  std::vector<std::shared_ptr<const Publication>> published;
};

// A thread's part.
struct FenceState {
  std::shared_ptr<const Publication> fenced;  // by the latest __threadfence
  std::vector<Acquired> pending;              // atomics since then; the next fence makes them count
};

class BlockOrder {
 public:
  void begin_launch() { words_.clear(); }
  void begin_block(uint32_t block) {
    block_ = block;
    acquired_.clear();
  }
  void fence(FenceState& state, uint16_t thread, const uint32_t* clock, unsigned clock_words);
  void atomic(FenceState& state, const void* word, uint16_t thread);
  // Whether `thread`, with vector clock `clock`, comes after `step`, as far as fences and atomics say.
  bool orders(const Step& step, uint16_t thread, const uint32_t* clock) const;

 private:
  static bool visible(const Acquired& acquired, uint16_t thread, const uint32_t* clock) {
    return acquired.thread == thread || clock[acquired.thread] >= acquired.clock;
  }
  static bool covers(const Acquired& acquired, const Step& step, std::vector<const SyncWord*>& seen);
  uint32_t block_ = 0;
  std::unordered_map<const void*, SyncWord> words_;
  std::vector<Acquired> acquired_;  // by threads of the running block
};

}  // namespace kvk::emu
