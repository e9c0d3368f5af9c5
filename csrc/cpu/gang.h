// A gang: the threads that work on one operator together, with a barrier they may use at every time step.
//
// Threads come from torch's own intra-op pool (run_gang in gang.cpp). Whoever arrives in time joins; the gang is
// closed before work begins, so a barrier never waits for a thread that the pool didn't start (nested regions, a
// smaller pool, a thread that shares its core). Results must not depend on the gang's size.
#pragma once

#include <cstdint>

namespace seqattn {

inline constexpr int kMaxGang = 256;

struct alignas(64) BarrierFlag {
  int64_t step = 0;
};

// Waits for another thread: spin, then yield, so that two threads on one core still make progress.
void pause_or_yield(int* spins);

struct Gang {
  int rank = 0;
  int size = 1;
  BarrierFlag* flags = nullptr;  // [size], zero before the first barrier
  int64_t step = 0;

  void barrier() {
    if (size == 1) return;
    ++step;
    __atomic_store_n(&flags[rank].step, step, __ATOMIC_RELEASE);
    for (int i = 0; i < size; ++i) {
      int spins = 0;
      while (__atomic_load_n(&flags[i].step, __ATOMIC_ACQUIRE) < step) pause_or_yield(&spins);
    }
  }

  // This thread's part of n items: contiguous, sizes differing by at most one.
  void share(int64_t n, int64_t* begin, int64_t* end) const {
    *begin = n * rank / size;
    *end = n * (rank + 1) / size;
  }
};

namespace detail {
void run_gang(int threads, void (*body)(void*, Gang&), void* context);
}

// Runs body(gang) on up to `threads` threads of torch's pool, the caller among them.
template <class F>
void run_gang(int threads, F&& body) {
  detail::run_gang(
      threads, [](void* context, Gang& gang) { (*static_cast<F*>(context))(gang); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace seqattn
