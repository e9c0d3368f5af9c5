// Scratch memory that a thread keeps from call to call, so that operators don't pay for fresh pages each time.
#pragma once

#include <cstddef>

namespace seqattn {

// At least `bytes` bytes, aligned to a cache line, valid until this thread's next call. Contents are left over from
// earlier calls. Only the thread that calls an operator asks, never the threads of its gang.
void* workspace(std::size_t bytes);

}  // namespace seqattn
