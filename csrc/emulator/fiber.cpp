#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace seqattn::emulator {

namespace {
size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
}  // namespace

Stack::Stack(size_t bytes) : size_((bytes + page() - 1) / page() * page()) {
  void* map = mmap(nullptr, size_ + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, page(), PROT_NONE) != 0) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
}
Stack::~Stack() {
  if (map_) munmap(map_, size_ + page());
}
Stack::Stack(Stack&& other) noexcept : map_(std::exchange(other.map_, nullptr)), size_(other.size_) {}
char* Stack::bottom() const { return map_ + page(); }
bool Stack::guards(const void* address) const { return address >= map_ && address < map_ + page(); }

#if !SEQATTN_UCONTEXT
extern "C" void seqattn_switch_stack(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl seqattn_switch_stack
.hidden seqattn_switch_stack
.type seqattn_switch_stack, @function
seqattn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size seqattn_switch_stack, .-seqattn_switch_stack
)");
// Six registers, then the address to go to; the caller of that address finds the stack as after a call.
static constexpr int kSavedWords = 6;
#else
asm(R"(
.text
.globl seqattn_switch_stack
.hidden seqattn_switch_stack
.type seqattn_switch_stack, %function
seqattn_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size seqattn_switch_stack, .-seqattn_switch_stack
)");
#endif
#endif

namespace {
// The first switch to a fiber comes without arguments: they wait here.
thread_local Fiber* starting = nullptr;
}  // namespace

Fiber::Fiber(const Stack& stack, void (*entry)(void*), void* argument)
    : bottom_(stack.bottom()), size_(stack.size()), entry_(entry), argument_(argument) {
  void (*const trampoline)() = [] { start(starting); };
#if defined(__SANITIZE_ADDRESS__)
  // Who ran on this stack before may have been left in the middle of its functions, their frames still marked.
  ASAN_UNPOISON_MEMORY_REGION(stack.bottom(), stack.size());
#endif
#if SEQATTN_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.bottom();
  context_.uc_stack.ss_size = stack.size();
  context_.uc_link = nullptr;
  makecontext(&context_, trampoline, 0);
#elif defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(stack.bottom() + stack.size()) - 3;  // as a call leaves it
  top[0] = 0;  // where the trampoline would return to: ends a backtrace
  top[-1] = reinterpret_cast<uintptr_t>(trampoline);
  for (int i = 0; i < kSavedWords; ++i) top[-2 - i] = 0;
  sp_ = top - 1 - kSavedWords;
#else
  auto* frame = reinterpret_cast<uintptr_t*>(stack.bottom() + stack.size()) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uintptr_t>(trampoline);
  sp_ = frame;
#endif
}

void Fiber::start(Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->came_from_->bottom_, &self->came_from_->size_);
#endif
  self->entry_(self->argument_);
  std::abort();
}

void Fiber::resume(Fiber& from, bool from_ends) {
  came_from_ = &from;
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, bottom_, size_);
#else
  static_cast<void>(from_ends);
#endif
#if SEQATTN_UCONTEXT
  swapcontext(&from.context_, &context_);
#else
  seqattn_switch_stack(&from.sp_, sp_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, &from.came_from_->bottom_, &from.came_from_->size_);
#endif
}

}  // namespace seqattn::emulator
