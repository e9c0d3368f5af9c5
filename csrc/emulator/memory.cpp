#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <sstream>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace seqattn::emulator {

namespace {
constexpr unsigned char kPattern = 0xFF;  // NaN in every float type, -1 in integers
constexpr size_t kAlignment = 16;
}  // namespace

Buffer::Buffer(std::string name, size_t bytes, bool at_end) : name_(std::move(name)), bytes_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_ = std::max(page, (bytes + page - 1) / page * page);
  void* map = mmap(nullptr, mapped_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
  begin_ = map_ + page;
  if (mprotect(begin_, mapped_, PROT_READ | PROT_WRITE) != 0) {
    munmap(map_, mapped_ + 2 * page);
    throw std::bad_alloc();
  }
  std::memset(begin_, kPattern, mapped_);
  data_ = begin_ + (at_end ? (mapped_ - bytes) / kAlignment * kAlignment : 0);
  all()[data_] = this;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(begin_, data_ - begin_);
  ASAN_POISON_MEMORY_REGION(data_ + bytes_, begin_ + mapped_ - data_ - bytes_);
#endif
}

Buffer::~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(begin_, mapped_);
#endif
  all().erase(data_);
  munmap(map_, mapped_ + (begin_ - map_) * 2);
}

Shadow& Buffer::shadow() {
  if (!shadow_) shadow_ = std::make_unique<Shadow>(bytes_, kBefore);
  return *shadow_;
}

void Buffer::forget() { shadow_.reset(); }

std::string Buffer::damage() const {
#if !defined(__SANITIZE_ADDRESS__)
  const auto written = [](char c) { return static_cast<unsigned char>(c) != kPattern; };
  const char* after = std::find_if(data_ + bytes_, begin_ + mapped_, written);
  if (after != begin_ + mapped_) return "write out of bounds: " + describe(after);
  const auto before = std::find_if(std::make_reverse_iterator(data_), std::make_reverse_iterator(begin_), written);
  if (before != std::make_reverse_iterator(begin_)) return "write out of bounds: " + describe(&*before);
#endif
  return "";
}

Buffer* Buffer::find(const void* address, size_t bytes) {
  const char* a = static_cast<const char*>(address);
  auto it = all().upper_bound(a);
  if (it == all().begin()) return nullptr;
  Buffer* b = std::prev(it)->second;
  return a + bytes <= b->data_ + b->bytes_ ? b : nullptr;
}

std::string Buffer::describe(const void* address) {
  const char* a = static_cast<const char*>(address);
  std::ostringstream text;
  constexpr ptrdiff_t kNear = 1 << 20;
  ptrdiff_t nearest = kNear;
  for (const auto& [data, buffer] : all()) {
    const ptrdiff_t before = data - a, after = a - (data + buffer->bytes_);
    if (before > 0 && before < nearest) {
      nearest = before;
      text.str("");
      text << before << " bytes before the start of " << buffer->name_;
    } else if (after >= 0 && after < nearest) {
      nearest = after;
      text.str("");
      text << after << " bytes past the end of " << buffer->name_ << " (" << buffer->bytes_ << " bytes)";
    }
  }
  if (nearest == kNear) text << "address " << address << " is in no buffer";
  return text.str();
}

std::map<const char*, Buffer*>& Buffer::all() {
  static std::map<const char*, Buffer*> buffers;
  return buffers;
}

}  // namespace seqattn::emulator
