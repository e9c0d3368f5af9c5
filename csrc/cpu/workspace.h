// Scratch memory that a thread keeps from call to call, so that operators don't pay for fresh pages each time.
#pragma once

#include <cstddef>

namespace seqattn {

// At least `bytes` bytes, aligned to a cache line, valid until this thread's next call. Contents are left over from
// earlier calls. Only the thread that calls an operator asks, never the threads of its gang.
void* workspace(std::size_t bytes);

// Asks for huge pages for fresh memory that is written once and read often, where it is large enough to gain: 73 MB
// take 80 ms of page faults in small pages and 15 in huge ones, and are then read an eighth faster. Linux; else
// nothing.
void want_huge_pages(void* memory, std::size_t bytes);

}  // namespace seqattn
