// Barriers, fences, atomics and operations of a warp, for the emulator.
#pragma once

#include <type_traits>

#include "pointers.h"
#include "types.h"

namespace seqattn::gpu {

using Here = std::source_location;

SEQATTN_DEVICE void block_sync(Here here = Here::current()) {
  detail::machine().block_barrier(0, block_size(), true, detail::place(here));
}
SEQATTN_DEVICE void named_barrier_sync(int id, int threads, Here here = Here::current()) {
  detail::machine().block_barrier(id, threads, true, detail::place(here));
}
SEQATTN_DEVICE void named_barrier_arrive(int id, int threads, Here here = Here::current()) {
  detail::machine().block_barrier(id, threads, false, detail::place(here));
}

SEQATTN_DEVICE void cluster_arrive(Here here = Here::current()) {
  detail::machine().cluster_arrive(true, detail::place(here));
}
SEQATTN_DEVICE void cluster_arrive_relaxed(Here here = Here::current()) {
  detail::machine().cluster_arrive(false, detail::place(here));
}
SEQATTN_DEVICE void cluster_wait(Here here = Here::current()) { detail::machine().cluster_wait(detail::place(here)); }

namespace detail {

template <class T>
struct Exchange {
  T value;
  int from;
  T result;
};

// Each lane gets the value of lane `from`.
template <class T>
SEQATTN_DEVICE T exchange(const char* operation, T value, int from, Here here) {
  static_assert(std::is_trivially_copyable_v<T>);
  Exchange<T> request{value, from, value};
  machine().meet_warp(
      operation, &request,
      [](emulator::Machine&, emulator::Warp& warp) {
        for (void* r : warp.requests) {
          auto* lane = static_cast<Exchange<T>*>(r);
          lane->result = static_cast<Exchange<T>*>(warp.requests[lane->from & 31])->value;
        }
      },
      place(here));
  return request.result;
}

}  // namespace detail

SEQATTN_DEVICE void warp_sync(Here here = Here::current()) {
  detail::machine().meet_warp(
      "warp_sync", nullptr, [](emulator::Machine& m, emulator::Warp& warp) { m.order_warp(warp); },
      detail::place(here));
}
template <class T>
SEQATTN_DEVICE T shuffle(T x, int lane, Here here = Here::current()) {
  return detail::exchange("shuffle", x, lane, here);
}
template <class T>
SEQATTN_DEVICE T shuffle_xor(T x, int mask, Here here = Here::current()) {
  return detail::exchange("shuffle_xor", x, lane_index() ^ mask, here);
}
template <class T>
SEQATTN_DEVICE T shuffle_down(T x, int lanes, Here here = Here::current()) {
  const int from = lane_index() + lanes;
  return detail::exchange("shuffle_down", x, from < 32 ? from : lane_index(), here);
}
template <class T>
SEQATTN_DEVICE T shuffle_up(T x, int lanes, Here here = Here::current()) {
  const int from = lane_index() - lanes;
  return detail::exchange("shuffle_up", x, from >= 0 ? from : lane_index(), here);
}
SEQATTN_DEVICE uint32_t ballot(bool x, Here here = Here::current()) {
  struct Vote {
    bool value;
    uint32_t result;
  } request{x, 0};
  detail::machine().meet_warp(
      "ballot", &request,
      [](emulator::Machine&, emulator::Warp& warp) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(static_cast<Vote*>(warp.requests[i])->value) << i;
        for (void* r : warp.requests) static_cast<Vote*>(r)->result = votes;
      },
      detail::place(here));
  return request.result;
}
SEQATTN_DEVICE bool warp_any(bool x, Here here = Here::current()) { return ballot(x, here) != 0; }
SEQATTN_DEVICE bool warp_all(bool x, Here here = Here::current()) { return ballot(x, here) == 0xFFFFFFFFu; }

// A fence alone orders nothing that a barrier or a counter would not order here: they all release what came before.
SEQATTN_DEVICE void fence_device() {}
SEQATTN_DEVICE void fence_cluster() {}

// Waiting is for ever when nobody else moves: the scheduler sees that, there is no need for a clock.
struct SpinGuard {
  SEQATTN_DEVICE void spin(Here here = Here::current()) {
    detail::machine().spin("a spinning loop", detail::place(here));
  }
};

SEQATTN_DEVICE uint32_t load_acquire(const uint32_t* p, Here here = Here::current()) {
  detail::machine().spin("load_acquire", detail::place(here));
  const uint32_t x = *p;
  detail::machine().counter_acquire(p);
  return x;
}
SEQATTN_DEVICE void store_release(uint32_t* p, uint32_t x) {
  detail::machine().counter_release(p, false);
  *p = x;
}
SEQATTN_DEVICE uint32_t atomic_add_release(uint32_t* p, uint32_t x) {
  detail::machine().counter_release(p, true);
  const uint32_t before = *p;
  *p = before + x;
  return before;
}
SEQATTN_DEVICE void add_release(uint32_t* p, uint32_t x) { atomic_add_release(p, x); }
template <class T>
SEQATTN_DEVICE T atomic_add(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}

struct alignas(8) Barrier {
  uint64_t state;
};

namespace detail {
// A barrier's place; only barrier_init writes there, so that another use of the bytes shows as a race.
inline emulator::PhaseBarrier& barrier(const emulator::Spot& spot) {
  const Pointer<Barrier> p(spot);
  p.check(false);
  return machine().barrier_at(*spot.block, spot.offset);
}
}  // namespace detail

SEQATTN_DEVICE void barrier_init(Shared<Barrier> b, int arrivals) {
  b.check(true);
  detail::machine().init_barrier(*b.spot().block, b.spot().offset, arrivals);
}
SEQATTN_DEVICE void barrier_fence_init() {}
SEQATTN_DEVICE void barrier_arrive(Shared<Barrier> b) { detail::machine().arrive(detail::barrier(b.spot())); }
SEQATTN_DEVICE void barrier_arrive_expect(Shared<Barrier> b, uint32_t bytes) {
  detail::machine().arrive(detail::barrier(b.spot()), bytes);
}
SEQATTN_DEVICE void barrier_arrive_remote(Remote<Barrier> b) { detail::machine().arrive(detail::barrier(b.spot())); }
SEQATTN_DEVICE bool barrier_try_wait(Shared<Barrier> b, uint32_t parity, Here here = Here::current()) {
  emulator::PhaseBarrier& barrier = detail::barrier(b.spot());
  if (!detail::machine().phase_ended(barrier, parity)) {
    detail::machine().spin("barrier_try_wait", detail::place(here));
    if (!detail::machine().phase_ended(barrier, parity)) return false;
  }
  detail::machine().acquire(detail::self(), barrier.known);
  return true;
}
SEQATTN_DEVICE void barrier_wait(Shared<Barrier> b, uint32_t parity, Here here = Here::current()) {
  detail::machine().wait_barrier(detail::barrier(b.spot()), parity, detail::place(here));
}
SEQATTN_DEVICE void barrier_wait_cluster(Shared<Barrier> b, uint32_t parity, Here here = Here::current()) {
  detail::machine().wait_barrier(detail::barrier(b.spot()), parity, detail::place(here));
}

}  // namespace seqattn::gpu
