#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace seqattn {

void* workspace(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local std::size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const std::size_t rounded = (bytes + kLine - 1) / kLine * kLine;
    memory.reset(std::aligned_alloc(kLine, rounded));
    if (!memory) throw std::bad_alloc();
    want_huge_pages(memory.get(), rounded);
    size = rounded;
  }
  return memory.get();
}

void want_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kLeast = std::size_t(4) << 20;  // two huge pages: at least one lies inside
  if (bytes < kLeast) return;
  // Whole pages of the memory alone: its neighbours are somebody else's.
  const auto page = std::uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  // A refusal costs speed alone.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace seqattn
