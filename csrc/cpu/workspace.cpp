#include "workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

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
    size = rounded;
  }
  return memory.get();
}

}  // namespace seqattn
