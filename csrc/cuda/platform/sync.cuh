// Barriers, fences, atomics and operations of a warp, for nvcc.
#pragma once

#include "types.cuh"

namespace seqattn::gpu {

// All threads of the block.
SEQATTN_DEVICE void block_sync() { __syncthreads(); }
// A part of the block: `threads` (whole warps) meet at barrier `id` (1 to 15; 0 is block_sync's). Who arrives doesn't
// wait; it counts among `threads`.
SEQATTN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SEQATTN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of the cluster; memory written before arrive (not: before arrive_relaxed) is seen after wait.
SEQATTN_DEVICE void cluster_arrive() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
SEQATTN_DEVICE void cluster_arrive_relaxed() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}
SEQATTN_DEVICE void cluster_wait() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Lanes of a warp: a barrier that orders their memory accesses, and exchanges that do not.
SEQATTN_DEVICE void warp_sync() { __syncwarp(); }
template <class T>
SEQATTN_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
SEQATTN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
SEQATTN_DEVICE T shuffle_down(T x, int lanes) {
  return __shfl_down_sync(0xffffffffu, x, lanes);
}
template <class T>
SEQATTN_DEVICE T shuffle_up(T x, int lanes) {
  return __shfl_up_sync(0xffffffffu, x, lanes);
}
SEQATTN_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
SEQATTN_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
SEQATTN_DEVICE bool warp_all(bool x) { return __all_sync(0xffffffffu, x); }

// Orders this thread's accesses before and after it, as the other blocks see them.
SEQATTN_DEVICE void fence_device() { __threadfence(); }
SEQATTN_DEVICE void fence_cluster() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// For loops that wait for another block: after about ten seconds the kernel traps instead of hanging the device.
struct SpinGuard {
  long long start = 0;
  SEQATTN_DEVICE void spin() {
    const long long now = clock64();
    if (start == 0) {
      start = now;
    } else if (now - start > 20'000'000'000) {
      __trap();
    }
  }
};

// Counters in global memory, device scope. load_acquire in a loop waits for another block's add_release or
// store_release and sees what that block wrote before.
SEQATTN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
SEQATTN_DEVICE void store_release(uint32_t* p, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Returns the value before.
SEQATTN_DEVICE uint32_t atomic_add_release(uint32_t* p, uint32_t x) {
  uint32_t y;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(y) : "l"(p), "r"(x) : "memory");
  return y;
}
SEQATTN_DEVICE void add_release(uint32_t* p, uint32_t x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Orders nothing; sums in no fixed order.
template <class T>
SEQATTN_DEVICE T atomic_add(T* p, T x) {
  return atomicAdd(p, x);
}

// A barrier in shared memory that counts arrivals and bytes (mbarrier, sm_90). A phase ends once all arrivals of
// barrier_init and all bytes of barrier_expect came; waiting for phase 0, 1, 2.. takes parity 0, 1, 0..
struct alignas(8) Barrier {
  uint64_t state;
};

SEQATTN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// By one thread. Before others use it: barrier_fence_init() by that thread, then block_sync() or cluster_sync().
SEQATTN_DEVICE void barrier_init(Shared<Barrier> b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
SEQATTN_DEVICE void barrier_fence_init() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}
SEQATTN_DEVICE void barrier_arrive(Shared<Barrier> b) {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#else
  __trap();
#endif
}
// Arrives, and lets the phase wait for `bytes` more (of store_async, bulk_copy).
SEQATTN_DEVICE void barrier_arrive_expect(Shared<Barrier> b, uint32_t bytes) {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}
// Arrives at a peer's barrier; what this thread wrote before is seen by who waits there with barrier_wait_cluster.
SEQATTN_DEVICE void barrier_arrive_remote(Remote<Barrier> b) {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(b.address) : "memory");
#else
  __trap();
#endif
}
// Whether the phase of this parity has ended; may wait a while.
SEQATTN_DEVICE bool barrier_try_wait(Shared<Barrier> b, uint32_t parity) {
#if SEQATTN_HAVE_CLUSTERS
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done != 0;
#else
  __trap();
  return false;
#endif
}
SEQATTN_DEVICE void barrier_wait(Shared<Barrier> b, uint32_t parity) {
  SpinGuard guard;
  while (!barrier_try_wait(b, parity)) guard.spin();
}
// The same where peers wrote or arrived: acquires at cluster scope.
SEQATTN_DEVICE void barrier_wait_cluster(Shared<Barrier> b, uint32_t parity) {
#if SEQATTN_HAVE_CLUSTERS
  SpinGuard guard;
  while (true) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
    if (done) return;
    guard.spin();
  }
#else
  __trap();
#endif
}

}  // namespace seqattn::gpu
