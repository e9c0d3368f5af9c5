// Shared memory, a peer's shared memory, asynchronous copies and hinted accesses of global memory, for nvcc.
#pragma once

#include <type_traits>

#include "sync.cuh"
#include "types.cuh"

namespace seqattn::gpu {

// Dynamic shared memory of the launch, from `offset` bytes on; its start is aligned to 1024 bytes.
template <class T>
SEQATTN_DEVICE Shared<T> dynamic_shared(size_t offset = 0) {
  extern __shared__ __align__(1024) unsigned char seqattn_dynamic_shared[];
  return reinterpret_cast<T*>(seqattn_dynamic_shared + offset);
}
// A static array of shared memory: one for each (T, N, Tag) in a kernel.
template <class T, int N, int Tag = 0>
SEQATTN_DEVICE Shared<T> shared_array() {
  __shared__ alignas(16) T data[N];
  return data;
}
template <class U, class T>
SEQATTN_DEVICE Shared<U> shared_cast(T* p) {
  return reinterpret_cast<U*>(p);
}

// Loads and stores by value, of numbers or Vec, from shared or global memory.
template <class T>
SEQATTN_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
SEQATTN_DEVICE void store(T* p, T x) {
  *p = x;
}

// The same place in shared memory of block `rank` of the cluster.
template <class T>
SEQATTN_DEVICE Remote<T> map_shared(T* p, int rank) {
#if SEQATTN_HAVE_CLUSTERS
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
  return {r};
#else
  __trap();
  return {0};
#endif
}
template <class U, class T>
SEQATTN_DEVICE Remote<U> remote_cast(Remote<T> p) {
  return {p.address};
}

// Stores 2, 4, 8 or 16 bytes, aligned, to a peer. Seen there after a cluster barrier or barrier_arrive_remote.
template <class T>
SEQATTN_DEVICE void store_remote(Remote<T> p, T x) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if SEQATTN_HAVE_CLUSTERS
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared::cluster.b16 [%0], %1;" ::"r"(p.address), "h"(reinterpret_cast<uint16_t&>(x)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(p.address), "r"(reinterpret_cast<uint32_t&>(x)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(p.address), "l"(reinterpret_cast<uint64_t&>(x)) : "memory");
  } else {
    const uint4 v = reinterpret_cast<uint4&>(x);
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.address), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
  }
#else
  __trap();
#endif
}
template <class T>
SEQATTN_DEVICE T load_remote(Remote<T> p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if SEQATTN_HAVE_CLUSTERS
  if constexpr (sizeof(T) == 2) {
    uint16_t x;
    asm volatile("ld.shared::cluster.b16 %0, [%1];" : "=h"(x) : "r"(p.address) : "memory");
    return reinterpret_cast<T&>(x);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t x;
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(x) : "r"(p.address) : "memory");
    return reinterpret_cast<T&>(x);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t x;
    asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(x) : "r"(p.address) : "memory");
    return reinterpret_cast<T&>(x);
  } else {
    uint4 x;
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(p.address)
                 : "memory");
    return reinterpret_cast<T&>(x);
  }
#else
  __trap();
  return {};
#endif
}

// Stores 4, 8 or 16 bytes, aligned, to a peer and counts them at `barrier`, which lies in the same peer. Who waits
// there sees them; no other barrier shows them.
template <class T>
SEQATTN_DEVICE void store_async(Remote<T> p, T x, Remote<Barrier> barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if SEQATTN_HAVE_CLUSTERS
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(p.address),
                 "r"(reinterpret_cast<uint32_t&>(x)), "r"(barrier.address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(p.address),
                 "l"(reinterpret_cast<uint64_t&>(x)), "r"(barrier.address)
                 : "memory");
  } else {
    const uint4 v = reinterpret_cast<uint4&>(x);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(p.address),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier.address)
        : "memory");
  }
#else
  __trap();
#endif
}

// Copies `bytes` (a multiple of 16, both ends aligned to 16) of own shared memory to a peer, by one thread; counted at
// `barrier` of that peer. Between the stores that filled `from` and this: fence_async() by who stored, then a barrier.
template <class T>
SEQATTN_DEVICE void bulk_copy_to_peer(Remote<T> to, const T* from, uint32_t bytes, Remote<Barrier> barrier) {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.address),
      "r"(shared_address(from)), "r"(bytes), "r"(barrier.address)
      : "memory");
#else
  __trap();
#endif
}
// Copies `bytes` (a multiple of 16, aligned to 16) of global memory to own shared memory, counted at own `barrier`.
template <class T>
SEQATTN_DEVICE void bulk_load(Shared<T> to, const T* from, uint32_t bytes, Shared<Barrier> barrier) {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}
// Makes this thread's stores to shared memory visible to bulk copies issued after it.
SEQATTN_DEVICE void fence_async() {
#if SEQATTN_HAVE_CLUSTERS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

// Copies 4, 8 or 16 bytes, aligned, from global to shared memory behind the thread's back; zeros where !valid, and then
// `from` is not read (but must be a pointer). The thread sees them after cp_async_wait, others after a barrier besides.
template <int kBytes, class T>
SEQATTN_DEVICE void cp_async(Shared<T> to, const T* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
// Ends a group of copies; waits until at most `kGroups` of the last groups are under way.
SEQATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups = 0>
SEQATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Global memory nobody writes during the kernel; memory read or written once (not kept in caches); memory that other
// blocks write during the kernel (past the first-level cache, which isn't coherent).
template <class T>
SEQATTN_DEVICE T load_readonly(const T* p) {
  return __ldg(p);
}
template <class T>
SEQATTN_DEVICE T load_streaming(const T* p) {
  return __ldcs(p);
}
template <class T>
SEQATTN_DEVICE void store_streaming(T* p, T x) {
  __stcs(p, x);
}
template <class T>
SEQATTN_DEVICE T load_coherent(const T* p) {
  return __ldcg(p);
}
template <class T>
SEQATTN_DEVICE void store_coherent(T* p, T x) {
  if constexpr (std::is_class_v<T> && sizeof(T) == 16) {
    __stcg(reinterpret_cast<uint4*>(p), reinterpret_cast<uint4&>(x));
  } else {
    __stcg(p, x);
  }
}
SEQATTN_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace seqattn::gpu
