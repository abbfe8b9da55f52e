// Calls that are checked and planned, and not run: kvk.explain(), docs/explain.md.
//
// While a thread explains, the CPU's loops over work and the launches on a card are noted and left out, and a card need not be
// there. Nothing of the call's memory is read or written then, but for what checks and planning read.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace kvk::explain {

// A card that is thought of.
struct Card {
  int arch = 0;  // compute capability, e.g. 90
  int num_sms = 0;
  int max_shared_per_block = 0;
};

struct Notes {
  std::optional<Card> card;        // none: the machine's own
  std::vector<std::string> steps;  // a JSON object each
};

extern constinit thread_local Notes* current;
inline Notes* notes() { return current; }

}  // namespace kvk::explain
