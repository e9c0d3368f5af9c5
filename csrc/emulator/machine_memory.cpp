// Checked accesses of shared and global memory.
#include <algorithm>
#include <sstream>

#include "machine.h"
#include "memory.h"

namespace seqattn::emulator {

size_t Machine::static_array(const void* key, size_t bytes) {
  const auto it = statics_.find(key);
  if (it != statics_.end()) return it->second.first;
  static_bytes_ += bytes;
  if (static_bytes_ > kStaticLimit) fail("more than 48 KB of static shared memory");
  const size_t offset = (shared_end_ + 15) / 16 * 16;
  shared_end_ = offset + bytes + kGap;
  statics_[key] = {offset, bytes};
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) make_static(*block, offset, bytes);
  }
  return offset;
}

void Machine::make_static(Block& block, size_t offset, size_t bytes) {
  const size_t end = std::max(block.memory.size(), offset + bytes + kGap);
  block.memory.resize(end, kUnwritten);
  block.shadow->grow(end, kUnallocated);
  block.shadow->set(offset, offset + bytes, kUninitialised);
}

void Machine::report(Problem problem, const std::string& memory, bool write, const Access& access,
                     const Access& other) const {
  std::ostringstream text;
  const auto at = [&](const Access& a) { return name_of(a.id) + " at " + line_of(a.pc); };
  const std::string verb = write ? "written by " : "read by ";
  switch (problem) {
    case Problem::unallocated:
      text << "access out of bounds: " << memory << " " << verb << at(access);
      break;
    case Problem::uninitialised:
      text << "read of uninitialised memory: " << memory << " " << verb << at(access);
      break;
    case Problem::read_of_write:
    case Problem::write_of_write:
      text << "data race: " << memory << " " << verb << at(access) << ", written by " << at(other)
           << ", and no barrier orders them";
      break;
    default:
      text << "data race: " << memory << " " << verb << at(access) << ", read by " << at(other)
           << ", and no barrier orders them";
  }
  throw Fault(text.str());
}

// A peer's shared memory may be reached once it is known to run, and as long as it does.
void Machine::check_peer(Block& block, const Access& access) {
  Thread& t = *running_;
  if (block.exited) fail("access to the shared memory of " + block.name() + ", which has ended");
  if ((t.peers_running >> block.rank & 1) == 0) {
    bool known = false;
    for (const Thread& peer : block.threads) known = known || time_of(t.known, peer.id) > 0;
    if (!known) {
      fail("access to the shared memory of " + block.name() + " at " + line_of(access.pc) +
           " without a cluster barrier since the kernel's start: it may not run yet");
    }
    t.peers_running |= 1u << block.rank;
  }
  Time& last = block.remote[access.id];
  last = std::max(last, access.time);
}

char* Machine::shared(Block* block, int64_t offset, size_t bytes, size_t align, bool write, const void* pc,
                      const Access* engine) {
  Thread& t = self();
  const Access access = engine ? *engine : Access{t.id, t.now, pc};
  const auto memory = [&](size_t at) {
    std::ostringstream text;
    const size_t dynamic_end = kDynamicBegin + shape_.shared_bytes;
    text << "shared memory of " << block->name() << ", ";
    if (at < dynamic_end + kGap / 2) {
      text << "byte " << static_cast<int64_t>(at) - static_cast<int64_t>(kDynamicBegin) << " of "
           << shape_.shared_bytes;
    } else {
      text << "byte " << at - dynamic_end << " of the static arrays";
    }
    return text.str();
  };
  if (block == nullptr) fail("access through a null pointer to shared memory at " + line_of(pc));
  if (offset < 0 || offset + bytes > block->shadow->bytes()) {
    report(Problem::unallocated, memory(offset), write, access, {});
  }
  if (offset % align != 0) {
    fail("misaligned access: " + memory(offset) + " as " + std::to_string(align) + " bytes at " + line_of(pc));
  }
  if (block != t.block) check_peer(*block, access);
  Access other{};
  size_t at = offset;
  Shadow& shadow = *block->shadow;
  const Problem problem = write ? shadow.write(offset, bytes, access, t.witness(), &other, &at)
                                : shadow.read(offset, bytes, access, t.witness(), &other, &at);
  if (problem != Problem::none) report(problem, memory(at), write, access, other);
  return block->memory.data() + offset;
}

void Machine::global(const void* address, size_t bytes, size_t align, bool write, const void* pc) {
  Thread& t = self();
  Buffer* buffer = Buffer::find(address, bytes);
  const Access access{t.id, t.now, pc};
  if (buffer == nullptr) {
    const std::string memory = "global memory " + Buffer::describe(address);
    report(Problem::unallocated, memory, write, access, {});
  }
  const size_t offset = static_cast<const char*>(address) - buffer->data();
  const auto memory = [&](size_t at) {
    return "global memory " + buffer->name() + ", byte " + std::to_string(at) + " of " +
           std::to_string(buffer->bytes());
  };
  if (reinterpret_cast<uintptr_t>(address) % align != 0) {
    fail("misaligned access: " + memory(offset) + " as " + std::to_string(align) + " bytes at " + line_of(pc));
  }
  Access other{};
  size_t at = offset;
  const Problem problem = write ? buffer->shadow().write(offset, bytes, access, t.witness(), &other, &at)
                                : buffer->shadow().read(offset, bytes, access, t.witness(), &other, &at);
  if (problem != Problem::none) report(problem, memory(at), write, access, other);
}

Access Machine::copier_access(const void* pc) {
  Thread& t = self();
  if (t.copier == 0) t.copier = new_engine("cp_async of " + name_of(t.id));
  return {t.copier, t.group, pc};
}

// The thread has heard of its groups but for the last `groups`.
void Machine::copies_done(int groups) {
  Thread& t = self();
  const int64_t done = static_cast<int64_t>(t.group) - 1 - groups;
  if (t.copier == 0 || done < 1) return;
  Released own;
  own.add(nullptr, t.copier, static_cast<Time>(done));
  acquire(t, own.take());
}

}  // namespace seqattn::emulator
