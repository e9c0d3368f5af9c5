// Cooperative threads of control on one CPU thread. On x86-64 and aarch64 a switch saves the registers a call preserves
// and takes a few nanoseconds; elsewhere ucontext does it. AddressSanitizer is told of each switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define SEQATTN_UCONTEXT 1
#else
#define SEQATTN_UCONTEXT 0
#endif

namespace seqattn::emulator {

// A stack with an inaccessible page below it.
class Stack {
 public:
  explicit Stack(size_t bytes);
  ~Stack();
  Stack(Stack&& other) noexcept;
  Stack(const Stack&) = delete;
  char* bottom() const;
  size_t size() const { return size_; }
  bool guards(const void* address) const;  // whether the address lies in the page below

 private:
  char* map_;
  size_t size_;
};

// The CPU thread's own context (Fiber()), or one that starts in `entry(argument)` at its first switch. `entry` must not
// return and lets no exception out.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Stack& stack, void (*entry)(void*), void* argument);

  // Leaves `from`, the running one, and goes on with this one. `from_ends`: it is never gone back to.
  void resume(Fiber& from, bool from_ends = false);

 private:
  static void start(Fiber* self);

#if SEQATTN_UCONTEXT
  ucontext_t context_{};
#else
  void* sp_ = nullptr;
#endif
  const void* bottom_ = nullptr;  // nullptr until known for the CPU thread's own stack
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  Fiber* came_from_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace seqattn::emulator
