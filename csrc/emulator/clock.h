// Who knows what: vector clocks. Every thread (and every engine that copies behind a thread's back) has a number and a
// time of its own; an access is ordered before another if the second thread has heard of the first one's time since.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace seqattn::emulator {

using Id = uint32_t;
using Time = uint32_t;

// The latest time heard of each thread; 0: nothing. Never changed once made, so that many threads share one.
using Times = std::vector<Time>;
using Known = std::shared_ptr<const Times>;

inline Time time_of(const Known& known, Id id) { return known && id < known->size() ? (*known)[id] : 0; }

// The later time of each thread. Threads that know the same ask for the same join one after another.
class Joiner {
 public:
  Known join(const Known& a, const Known& b) {
    if (!a || a == b) return b;
    if (!b) return a;
    if (a == a_ && b == b_) return result_;
    auto times = std::make_shared<Times>(*a);
    merge(*times, *b);
    a_ = a;
    b_ = b;
    result_ = *times == *b ? b : *times == *a ? a : Known(std::move(times));
    return result_;
  }
  static void merge(Times& into, const Times& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
  }

 private:
  Known a_, b_, result_;
};

// What those who arrived at a barrier knew.
class Released {
 public:
  void add(const Known& known) {
    if (known && std::find(bases_.begin(), bases_.end(), known) == bases_.end()) bases_.push_back(known);
  }
  void add(const Known& known, Id id, Time time) {
    add(known);
    own_.emplace_back(id, time);
  }
  // The join of all, and starts anew.
  Known take() {
    auto times = std::make_shared<Times>();
    for (const Known& base : bases_) Joiner::merge(*times, *base);
    for (const auto& [id, time] : own_) {
      if (times->size() <= id) times->resize(id + 1);
      (*times)[id] = std::max((*times)[id], time);
    }
    bases_.clear();
    own_.clear();
    return times;
  }

 private:
  std::vector<Known> bases_;
  std::vector<std::pair<Id, Time>> own_;
};

}  // namespace seqattn::emulator
