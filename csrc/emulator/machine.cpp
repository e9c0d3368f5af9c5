#include "machine.h"

#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <sstream>
#include <utility>

#include "memory.h"

namespace seqattn::emulator {

namespace {
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // its frames are larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

const void* pc_of(void* context) {
  [[maybe_unused]] const auto* c = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__) && defined(__linux__)
  return reinterpret_cast<const char*>(c->uc_mcontext.gregs[REG_RIP]) + 1;
#elif defined(__aarch64__) && defined(__linux__)
  return reinterpret_cast<const char*>(c->uc_mcontext.pc) + 1;
#else
  return nullptr;
#endif
}
}  // namespace

// While it lives, a bad access of memory ends the launch, not the process.
class SignalScope {
 public:
  SignalScope() : stack_(64 * 1024) {
    stack_t own{};
    own.ss_sp = stack_.bottom();
    own.ss_size = stack_.size();
    sigaltstack(&own, &before_);
    struct sigaction action{};
    action.sa_sigaction = [](int n, siginfo_t* info, void* context) { Machine::on_signal(n, info, context); };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~SignalScope() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&before_, nullptr);
  }

 private:
  Stack stack_;
  stack_t before_{};
  struct sigaction segv_{}, bus_{};
};

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

Thread& Machine::self() {
  if (running_ == nullptr) throw Fault("a function of the GPU was called outside a kernel");
  return *running_;
}

void Machine::on_signal(int number, void* info, void* context) {
  Machine& m = get();
  if (m.running_ == nullptr) {  // not a kernel's: as without us
    signal(number, SIG_DFL);
    return;
  }
  const void* address = static_cast<siginfo_t*>(info)->si_addr;
  m.signal_pc_ = pc_of(context);
  m.signal_address_ = address;
  m.leave();
}

void Machine::run(const Shape& s, std::function<void()> kernel) {
  if (running_) throw Fault("launch: inside a kernel");
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw Fault("launch: " + what);
  };
  require(s.block > 0 && s.block <= 1024 && s.block % 32 == 0,
          "expected a block of 32, 64.. up to 1024 threads, got " + std::to_string(s.block));
  require(s.cluster >= 1 && s.cluster <= 16, "expected a cluster of 1 to 16 blocks, got " + std::to_string(s.cluster));
  require(s.grid % s.cluster == 0, "grid " + std::to_string(s.grid) + " is not a multiple of the cluster");
  require(s.grid_y <= 65535 && s.grid_z <= 65535, "a grid of more than 65535 blocks along y or z");
  require(s.shared_bytes <= kSharedLimit, "more than 227 KB of shared memory: " + std::to_string(s.shared_bytes));
  if (s.grid <= 0 || s.grid_y <= 0 || s.grid_z <= 0) return;

  reset();
  shape_ = s;
  kernel_ = std::move(kernel);
  generator_.seed(seed_);
  for (auto& [data, buffer] : Buffer::all()) buffer->forget();
  const int blocks = s.grid * s.grid_y * s.grid_z;
  shared_end_ = kDynamicBegin + s.shared_bytes + kGap;
  next_engine_ = Shadow::first_engine = static_cast<Id>(blocks) * s.block;
  try {
    const SignalScope signals;
    if (s.cooperative) {
      start_group(0, blocks);
    } else {
      for (int first = 0; first < blocks; first += s.cluster) start_group(first, s.cluster);
    }
  } catch (...) {
    reset();
    throw;
  }
  reset();
  for (const auto& [data, buffer] : Buffer::all()) {
    if (const std::string damage = buffer->damage(); !damage.empty()) throw Fault(damage);
  }
}

void Machine::reset() {
  clusters_.clear();
  ready_.clear();
  running_ = nullptr;
  alive_ = 0;
  fault_ = nullptr;
  signal_address_ = signal_pc_ = nullptr;
  joiner_ = {};
  engines_.clear();
  statics_.clear();
  static_bytes_ = shared_end_ = 0;
  counters_.clear();
}

// Runs blocks first_block.. (numbered x fastest) to their end, in clusters of the launch's size.
void Machine::start_group(int first_block, int blocks) {
  clusters_.clear();
  ready_.clear();
  const size_t threads = static_cast<size_t>(blocks) * shape_.block;
  while (stacks_.size() < threads) stacks_.emplace_back(kStackBytes);
  const size_t dynamic_end = kDynamicBegin + shape_.shared_bytes;
  size_t stack = 0;
  for (int i = 0; i < blocks; ++i) {
    if (i % shape_.cluster == 0) clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    const int number = first_block + i;
    block.cluster = &cluster;
    block.x = number % shape_.grid;
    block.y = number / shape_.grid % shape_.grid_y;
    block.z = number / shape_.grid / shape_.grid_y;
    block.rank = i % shape_.cluster;
    block.first_thread = static_cast<Id>(number) * shape_.block;
    block.warps.resize(shape_.block / 32);
    block.alive = shape_.block;
    cluster.alive += shape_.block;
    block.memory.assign(dynamic_end + kGap, kUnwritten);
    block.shadow = std::make_unique<Shadow>(dynamic_end + kGap, kUnallocated);
    block.shadow->set(kDynamicBegin, dynamic_end, kUninitialised);
    for (const auto& [key, place] : statics_) make_static(block, place.first, place.second);
    for (int t = 0; t < shape_.block; ++t) {
      Thread& thread = block.threads.emplace_back();
      thread.block = &block;
      thread.index = t;
      thread.id = block.first_thread + t;
      thread.fiber = Fiber(stacks_[stack++], &Machine::enter, &thread);
      ready_.push_back(&thread);
    }
  }
  alive_ = static_cast<int>(threads);
  schedule();
}

void Machine::enter(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  Machine& m = get();
  try {
    m.kernel_();
    m.finish(thread);
  } catch (...) {
    m.fault_ = std::current_exception();
  }
  m.leave();
}

// Goes back to the scheduler for good.
void Machine::leave() {
  Thread& thread = *running_;
  running_ = nullptr;
  main_.resume(thread.fiber, true);
  std::abort();
}

void Machine::schedule() {
  size_t idle = 0;
  while (alive_ > 0) {
    if (ready_.empty()) throw Fault("deadlock: " + stuck());
    if (seed_ != 0) std::swap(ready_.front(), ready_[generator_() % ready_.size()]);
    Thread& thread = *ready_.front();
    ready_.pop_front();
    thread.state = Thread::State::ready;
    thread.spinning = false;
    progress_ = false;
    running_ = &thread;
    thread.fiber.resume(main_);
    running_ = nullptr;
    if (fault_) std::rethrow_exception(std::exchange(fault_, nullptr));
    if (signal_address_ || signal_pc_) {
      const std::string at = " by " + name_of(thread.id) + " at " + line_of(signal_pc_);
      for (const Stack& stack : stacks_) {
        if (stack.guards(signal_address_)) throw Fault("stack overflow" + at);
      }
      throw Fault("access out of bounds of global memory" + at + ": " + Buffer::describe(signal_address_));
    }
    idle = thread.spinning && !progress_ ? idle + 1 : 0;
    if (idle > 100 + 20 * ready_.size()) throw Fault("deadlock: " + stuck());
  }
}

void Machine::wait(const char* waits_for, const Place& place) {
  Thread& thread = *running_;
  thread.state = Thread::State::waiting;
  thread.waits_for = waits_for;
  thread.place = place;
  main_.resume(thread.fiber);
}

void Machine::wake(std::vector<Thread*>& threads) {
  for (Thread* t : threads) {
    t->state = Thread::State::ready;
    ready_.push_back(t);
  }
  threads.clear();
}

void Machine::spin(const char* waits_for, Place place) {
  if (place.pc == nullptr) place.pc = __builtin_return_address(0);
  Thread& thread = self();
  thread.spinning = true;
  thread.waits_for = waits_for;
  thread.place = place;
  ready_.push_back(&thread);
  main_.resume(thread.fiber);
}

// Peers may no longer be reached once the block has ended: all they did here must be known to be over.
void Machine::finish(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = *block.cluster;
  if (thread.cluster_arrived) fail("the thread ends between the halves of a cluster barrier");
  release(block.at_exit);
  thread.state = Thread::State::done;
  --alive_;
  --cluster.alive;
  progress_ = true;
  if (--block.alive == 0) {
    block.exited = true;
    const Known known = block.at_exit.take();
    for (const auto& [id, time] : block.remote) {
      if (time_of(known, id) >= time) continue;
      fail(block.name() + " ends while " + name_of(id) +
           " may still access its shared memory: a cluster barrier is missing at the end");
    }
  }
  if (cluster.alive > 0 && cluster.meeting.arrived == cluster.alive) end_cluster_phase(cluster);
}

std::string Block::name() const {
  std::ostringstream text;
  text << "block " << x;
  if (y || z) text << "," << y << "," << z;
  return text.str();
}

std::string Machine::name_of(Id id) const {
  if (const auto it = engines_.find(id); it != engines_.end()) return it->second;
  const int number = static_cast<int>(id) / shape_.block;
  Block at;
  at.x = number % shape_.grid;
  at.y = number / shape_.grid % shape_.grid_y;
  at.z = number / shape_.grid / shape_.grid_y;
  return "thread " + std::to_string(id % shape_.block) + " of " + at.name();
}

Id Machine::new_engine(std::string name) {
  engines_[next_engine_] = std::move(name);
  return next_engine_++;
}

// Who waits where, in runs of threads that wait alike.
std::string Machine::stuck() const {
  std::ostringstream text;
  int lines = 0;
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      for (size_t i = 0; i < block->threads.size();) {
        const Thread& first = block->threads[i];
        size_t end = i + 1;
        const auto alike = [&](const Thread& t) {
          return t.state == first.state && (t.state == Thread::State::done || t.place.pc == first.place.pc);
        };
        while (end < block->threads.size() && alike(block->threads[end])) ++end;
        if (++lines > 24) return text.str() + "; ..";
        text << (lines > 1 ? "; " : "") << block->name() << " threads " << i << "-" << end - 1;
        if (first.state == Thread::State::done) {
          text << " have ended";
        } else {
          text << " wait at " << first.waits_for << " (" << line_of(first.place.pc) << ")";
        }
        i = end;
      }
    }
  }
  return text.str();
}

void Machine::fail(const std::string& what) const {
  throw Fault(running_ ? what + " (" + name_of(running_->id) + ")" : what);
}

}  // namespace seqattn::emulator

// Where the kernels started since the last call stand in this library's file, as nm has it: their number, and the first
// `room` of them. Called by tests, in every library that has the emulator.
extern "C" __attribute__((visibility("default"))) int64_t seqattn_take_launched(uint64_t* places, int64_t room) {
  auto& launched = seqattn::emulator::Machine::get().launched;
  int64_t count = 0;
  for (const void* kernel : launched) {
    Dl_info info{};
    if (dladdr(kernel, &info) == 0) std::abort();
    const auto from = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    if (count < room) places[count] = from(kernel) - from(info.dli_fbase);
    ++count;
  }
  launched.clear();
  return count;
}
