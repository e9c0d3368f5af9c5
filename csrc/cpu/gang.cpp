#include "gang.h"

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace seqattn {

void pause_or_yield(int* spins) {
  if (++*spins < 4000) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  } else {
    sched_yield();
  }
}

namespace detail {
namespace {
constexpr int kClosed = 1 << 30;
constexpr auto kPatience = std::chrono::microseconds(500);
}  // namespace

void run_gang(int threads, void (*body)(void*, Gang&), void* context) {
  threads = std::min(threads, kMaxGang);
  if (threads <= 1) {
    Gang alone;
    body(context, alone);
    return;
  }
  auto flags = std::make_unique<BarrierFlag[]>(threads);
  int arrived = 0;  // members besides the leader; kClosed is added when no more may join
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Gang gang;
    gang.flags = flags.get();
    if (begin == 0) {
      // The pool may start fewer threads than asked, each with a longer range.
      const int others = int((threads - 1) / end);
      const auto start = std::chrono::steady_clock::now();
      for (int spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < others;) {
        pause_or_yield(&spins);
        if (spins % 64 == 0 && std::chrono::steady_clock::now() - start > kPatience) break;
      }
      gang.size = 1 + __atomic_fetch_or(&arrived, kClosed, __ATOMIC_ACQ_REL);
    } else {
      int seen = __atomic_load_n(&arrived, __ATOMIC_ACQUIRE);
      do {
        if (seen & kClosed) return;
      } while (!__atomic_compare_exchange_n(&arrived, &seen, seen + 1, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
      gang.rank = seen + 1;
      int spins = 0;
      while (!(__atomic_load_n(&arrived, __ATOMIC_ACQUIRE) & kClosed)) pause_or_yield(&spins);
      gang.size = 1 + (__atomic_load_n(&arrived, __ATOMIC_ACQUIRE) & ~kClosed);
    }
    body(context, gang);
  });
}

}  // namespace detail
}  // namespace seqattn
