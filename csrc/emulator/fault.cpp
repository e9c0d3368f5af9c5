#include "fault.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>

namespace seqattn::emulator {

namespace {

bool is_own(const std::string& path) {
  for (const char* room : {"/emulator/platform", "/emulator/memory", "/emulator/machine", "/emulator/warp",
                           "/cuda/platform/", "/c++/", "??"}) {
    if (path.find(room) != std::string::npos) return true;
  }
  return false;
}

}  // namespace

std::string line_of(const void* pc) {
  std::ostringstream plain;
  plain << pc;
  Dl_info info{};
  if (pc == nullptr || dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return plain.str();
  std::ostringstream command;
  // One byte back: the address is where the call returns to.
  command << "addr2line -i -e '" << info.dli_fname << "' " << std::hex << "0x"
          << reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1 << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return plain.str();
  std::string found;
  char buffer[1024];
  while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) {
    std::string line(buffer);
    line = line.substr(0, line.find_first_of(" \n"));
    if (found.empty() && !is_own(line)) found = line.substr(line.find_last_of('/') + 1);
  }
  pclose(pipe);
  return found.empty() ? plain.str() : found;
}

}  // namespace seqattn::emulator
