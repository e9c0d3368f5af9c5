// What the emulator throws when a kernel does what no GPU promises to forgive.
#pragma once

#include <stdexcept>
#include <string>

namespace seqattn::emulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The line of kernel code of an address in it, past the emulator's own frames: "persistent.cuh:120"; the address
// itself without debug information or addr2line.
std::string line_of(const void* pc);

}  // namespace seqattn::emulator
