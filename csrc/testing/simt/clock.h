// SPDX-License-Identifier: Apache-2.0
// Who knows of what: vector clocks. Everything that reads or writes is an agent, whose actions are
// counted by ticks; a clock says up to which tick of each agent all has happened before. An access
// that conflicts with one its thread does not know of is a race, in whatever order they came.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace kd::cuda::simt {

using Ticks = std::vector<uint32_t>;
using Clock = std::shared_ptr<const Ticks>;  // threads that were synchronised share one

struct Epoch {
  uint32_t agent, tick;  // tick 0: never
};

inline bool knows(const Clock& clock, Epoch e) {
  return e.tick == 0 || (e.agent < clock->size() && (*clock)[e.agent] >= e.tick);
}

// What comes together at a barrier. Joined once all is there, since most threads bring the same.
class Gathering {
 public:
  void add(Epoch e) { epochs_.push_back(e); }
  void add(const Clock& clock, Epoch e) {
    clocks_.insert(clock);
    epochs_.push_back(e);
  }
  Clock join() {
    Ticks ticks;
    for (const Clock& clock : clocks_) {
      if (ticks.size() < clock->size()) ticks.resize(clock->size());
      for (size_t i = 0; i < clock->size(); i++) ticks[i] = std::max(ticks[i], (*clock)[i]);
    }
    for (Epoch e : epochs_) {
      if (ticks.size() <= e.agent) ticks.resize(e.agent + 1);
      ticks[e.agent] = std::max(ticks[e.agent], e.tick);
    }
    clocks_.clear();
    epochs_.clear();
    return std::make_shared<const Ticks>(std::move(ticks));
  }

 private:
  std::set<Clock> clocks_;  // few, of many threads
  std::vector<Epoch> epochs_;
};

// Of two clocks. Many threads learn of the same thing from the same state: answers are kept.
class Joiner {
 public:
  Clock operator()(const Clock& a, const Clock& b) {
    if (a == b) return a;
    if (known_.size() > 100) known_.clear();
    Clock& joined = known_[{a, b}];
    if (!joined) {
      Gathering both;
      both.add(a, {0, 0});
      both.add(b, {0, 0});
      joined = both.join();
    }
    return joined;
  }

 private:
  std::map<std::pair<Clock, Clock>, Clock> known_;
};

}  // namespace kd::cuda::simt
