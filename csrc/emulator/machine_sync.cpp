// Barriers, warps and what threads learn from one another.
#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace seqattn::emulator {

void Machine::release(Released& into) {
  Thread& t = *running_;
  into.add(t.known, t.id, t.now);
  ++t.now;
}

void Machine::acquire(Thread& thread, const Known& known) { thread.known = joiner_.join(thread.known, known); }

void Machine::block_barrier(int id, int threads, bool waits, Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  Thread& t = self();
  Block& block = *t.block;
  const std::string name = id == 0 ? "block_sync" : "named barrier " + std::to_string(id);
  if (id < 0 || id > 15 || threads % 32 != 0 || threads <= 0 || threads > shape_.block) {
    fail(name + ": expected 0 to 15 and whole warps of the block, got " + std::to_string(threads) + " threads");
  }
  Meeting& m = block.meetings[id];
  if (m.who.empty()) m.expected = threads;
  if (m.expected != threads) {
    fail(name + ": " + std::to_string(m.expected) + " threads expected at " + line_of(m.who.front().second.pc) + ", " +
         std::to_string(threads) + " at " + line_of(place.pc));
  }
  // Only who does not wait can come twice.
  const auto same = [&](const auto& other) { return other.first == &t; };
  if (id != 0 && std::any_of(m.who.begin(), m.who.end(), same)) fail(name + ": arrived twice in one phase");
  m.who.emplace_back(&t, place);
  release(m.released);
  progress_ = true;
  if (waits) m.waiting.push_back(&t);
  if (static_cast<int>(m.who.size()) < m.expected) {
    if (waits) wait(id == 0 ? "block_sync" : "a named barrier", place);
    return;
  }
  // Lanes of a warp must come together, and all of a block to block_sync: so says the CUDA manual.
  if (id == 0) {
    for (const auto& [other, at] : m.who) {
      if (at.line == place.line && std::strcmp(at.file, place.file) == 0) continue;
      fail("block_sync: part of the block is at " + line_of(at.pc) + " (" + name_of(other->id) + "), part at " +
           line_of(place.pc));
    }
  }
  std::vector<std::pair<int, Place>> warps(block.warps.size());
  for (const auto& [other, at] : m.who) {
    auto& [lanes, first] = warps[other->index / 32];
    if (lanes++ == 0) first = at;
    if (first.line != at.line || std::strcmp(first.file, at.file) != 0) {
      fail(name + ": lanes of a warp came to different places, " + line_of(first.pc) + " and " + line_of(at.pc));
    }
  }
  for (const auto& [lanes, first] : warps) {
    if (lanes != 0 && lanes != 32) {
      fail(name + ": reached by " + std::to_string(lanes) + " lanes of a warp only, at " + line_of(first.pc));
    }
  }
  const Known known = m.released.take();
  m.who.clear();
  std::erase(m.waiting, &t);
  for (Thread* other : m.waiting) acquire(*other, known);
  if (waits) acquire(t, known);
  wake(m.waiting);
}

void Machine::end_cluster_phase(Cluster& cluster) {
  cluster.known = joiner_.join(cluster.known, cluster.meeting.released.take());
  cluster.meeting.arrived = 0;
  ++cluster.phase;
  for (Thread* other : cluster.meeting.waiting) acquire(*other, cluster.known);
  wake(cluster.meeting.waiting);
}

void Machine::cluster_arrive(bool releases, Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  Thread& t = self();
  Cluster& cluster = *t.block->cluster;
  if (t.cluster_arrived) fail("cluster_arrive: twice without cluster_wait, at " + line_of(place.pc));
  t.cluster_arrived = true;
  t.cluster_phase = cluster.phase;
  progress_ = true;
  if (releases) release(cluster.meeting.released);
  if (++cluster.meeting.arrived == cluster.alive) end_cluster_phase(cluster);
}

void Machine::cluster_wait(Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  Thread& t = self();
  Cluster& cluster = *t.block->cluster;
  if (!t.cluster_arrived) fail("cluster_wait: without cluster_arrive, at " + line_of(place.pc));
  t.cluster_arrived = false;
  if (cluster.phase == t.cluster_phase) {
    cluster.meeting.waiting.push_back(&t);
    wait("cluster_wait", place);
  } else {
    acquire(t, cluster.known);
  }
}

void Machine::meet_warp(const char* operation, void* request, void (*compute)(Machine&, Warp&), Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  Thread& t = self();
  Warp& warp = t.block->warps[t.index / 32];
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.place = place;
  } else if (std::strcmp(warp.operation, operation) != 0 || warp.place.line != place.line ||
             std::strcmp(warp.place.file, place.file) != 0) {
    fail(std::string("lanes of a warp diverge: ") + warp.operation + " at " + line_of(warp.place.pc) + ", " +
         operation + " at " + line_of(place.pc));
  }
  warp.requests[t.index % 32] = request;
  warp.lanes[t.index % 32] = &t;
  progress_ = true;
  if (++warp.arrived < 32) {
    warp.waiting.push_back(&t);
    wait(operation, place);
    return;
  }
  warp.arrived = 0;
  if (compute) compute(*this, warp);
  wake(warp.waiting);
}

void Machine::order_warp(Warp& warp) {
  Released released;
  for (Thread* t : warp.lanes) released.add(t->known, t->id, t->now++);
  const Known known = released.take();
  for (Thread* t : warp.lanes) acquire(*t, known);
}

void Machine::init_barrier(Block& block, size_t offset, int arrivals) {
  if (offset % 8 != 0) fail("barrier_init: not aligned to 8 bytes");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("barrier_init: expected 1 to 2^20 - 1 arrivals");
  PhaseBarrier& b = block.barriers[offset];
  if (!b.waiting.empty()) fail("barrier_init: threads wait at the barrier");
  b = PhaseBarrier{};
  b.id = new_engine("the copy counted at a barrier of " + block.name());
  b.expected = b.pending = arrivals;
}

PhaseBarrier& Machine::barrier_at(Block& block, size_t offset) {
  const auto it = block.barriers.find(offset);
  if (it == block.barriers.end()) fail("a barrier is used before barrier_init");
  return it->second;
}

void Machine::end_phase_if_complete(PhaseBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.released.add(nullptr, b.id, b.phase);
  b.known = joiner_.join(b.known, b.released.take());
  b.pending = b.expected;
  for (Thread* other : b.waiting) acquire(*other, b.known);
  wake(b.waiting);
}

void Machine::arrive(PhaseBarrier& b, int64_t bytes) {
  if (b.pending == 0) fail("more arrivals at a barrier than barrier_init says");
  progress_ = true;
  release(b.released);
  b.bytes += bytes;
  --b.pending;
  end_phase_if_complete(b);
}

void Machine::complete(PhaseBarrier& b, int64_t bytes) {
  progress_ = true;
  release(b.released);
  b.bytes -= bytes;
  end_phase_if_complete(b);
}

bool Machine::phase_ended(const PhaseBarrier& b, uint32_t parity) const { return (b.phase & 1) != parity; }

void Machine::wait_barrier(PhaseBarrier& b, uint32_t parity, Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  if (parity > 1) fail("barrier_wait: expected parity 0 or 1, got " + std::to_string(parity));
  Thread& t = self();
  if (phase_ended(b, parity)) {
    acquire(t, b.known);
  } else {
    b.waiting.push_back(&t);
    wait("barrier_wait", place);
  }
}

void Machine::counter_release(const void* address, bool keeps) {
  Released own;
  release(own);
  Known& known = counters_[address];
  known = keeps ? joiner_.join(known, own.take()) : own.take();
  progress_ = true;
}

void Machine::counter_acquire(const void* address) { acquire(self(), counters_[address]); }

}  // namespace seqattn::emulator
