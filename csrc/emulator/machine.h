// The emulated GPU: threads as fibers, blocks, clusters, and the barriers they meet at. All blocks of a cluster, or of
// a cooperative grid, live together; other blocks run one after another. One CPU thread runs it all.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "clock.h"
#include "fault.h"
#include "fiber.h"
#include "shadow.h"

namespace seqattn::emulator {

struct Block;
struct Cluster;

// Where in a kernel's source: threads of a warp must be at the same place when they meet.
struct Place {
  const char* file;
  unsigned line;
  const void* pc;
};

struct Thread {
  Block* block = nullptr;
  int index = 0;  // in the block
  Id id = 0;      // in the grid
  Time now = 1;
  Known known;
  Fiber fiber;

  enum class State { ready, waiting, done } state = State::ready;
  const char* waits_for = "";
  Place place{};
  bool spinning = false;

  Time cluster_phase = 0;  // of the cluster's barrier when this thread arrived
  bool cluster_arrived = false;
  uint32_t peers_running = 0;  // blocks of the cluster known to run, by rank

  // Copies behind the thread's back: the engine's number (0: none yet), and the group being filled.
  Id copier = 0;
  Time group = 1;
  Time fenced = 0;  // its stores up to here are visible to bulk copies

  Witness witness() const { return {id, &known}; }
};

// Threads that wait for one another.
struct Meeting {
  int expected = 0, arrived = 0;
  Released released;
  std::vector<std::pair<Thread*, Place>> who;  // all that arrived; at the block's barriers only
  std::vector<Thread*> waiting;
};

// 32 lanes at the same operation. The last to come computes for all; results go where the requests say.
struct Warp {
  int arrived = 0;
  const char* operation = "";
  Place place{};
  std::array<void*, 32> requests{};
  std::array<Thread*, 32> lanes{};
  std::vector<Thread*> waiting;
};

// An mbarrier.
struct PhaseBarrier {
  Id id = 0;  // of the engine that writes what the barrier counts; its time is the phase
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  Time phase = 0;  // phases ended
  Released released;
  Known known;  // after the last phase
  std::vector<Thread*> waiting;
};

struct Block {
  Cluster* cluster = nullptr;
  int x = 0, y = 0, z = 0;
  int rank = 0;
  Id first_thread = 0;
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  std::array<Meeting, 16> meetings;
  std::map<size_t, PhaseBarrier> barriers;  // by offset
  int alive = 0;
  bool exited = false;
  Released at_exit;

  // Grow when a static array is first asked for: pointers into them last for one access.
  std::vector<char> memory;
  std::unique_ptr<Shadow> shadow;
  std::map<Id, Time> remote;  // the last access of each foreign thread or engine

  std::string name() const;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
  Time phase = 0;
  int alive = 0;
  Known known;
};

// A launch.
struct Shape {
  int grid = 1, grid_y = 1, grid_z = 1;
  int block = 32;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// Dynamic shared memory lies from kDynamicBegin on, static arrays after it, with gaps between all of them.
inline constexpr size_t kDynamicBegin = 1024, kGap = 256, kStaticLimit = 48 * 1024;
inline constexpr char kUnwritten = static_cast<char>(0xFF);  // NaN in every float type
inline constexpr size_t kSharedLimit = 227 * 1024;

class Machine {
 public:
  static Machine& get();

  // Runs `kernel` once in each thread. Throws Fault; the machine can be used again after it.
  void run(const Shape& shape, std::function<void()> kernel);

  // Which of the emulated devices kernels are started for (platform/launch.h).
  int device = 0;
  // Every kernel that was started since this was last cleared.
  std::set<const void*> launched;

  // 0 runs threads in their order; another number draws the order from a generator seeded with it.
  void set_seed(uint32_t seed) { seed_ = seed; }

  const Shape& shape() const { return shape_; }
  // The thread that runs; throws where there is none.
  Thread& self();

  // Lets the others run; where all that is left does so in vain, they wait for ever.
  void spin(const char* waits_for, Place place);

  void block_barrier(int id, int threads, bool waits, Place place);
  void cluster_arrive(bool releases, Place place);
  void cluster_wait(Place place);
  // Waits for all 32 lanes; `compute` runs once.
  void meet_warp(const char* operation, void* request, void (*compute)(Machine&, Warp&), Place place);
  // All lanes hear of all.
  void order_warp(Warp& warp);

  PhaseBarrier& barrier_at(Block& block, size_t offset);
  void init_barrier(Block& block, size_t offset, int arrivals);
  void arrive(PhaseBarrier& barrier, int64_t bytes = 0);  // and expect bytes
  void complete(PhaseBarrier& barrier, int64_t bytes);    // bytes of a copy came
  bool phase_ended(const PhaseBarrier& barrier, uint32_t parity) const;
  void wait_barrier(PhaseBarrier& barrier, uint32_t parity, Place place);

  // What the running thread tells others (time moves on), what a thread hears.
  void release(Released& into);
  void acquire(Thread& thread, const Known& known);
  // The same by a counter in global memory; `keeps` what it told before (an atomic operation does).
  void counter_release(const void* address, bool keeps);
  void counter_acquire(const void* address);

  // The offset of a static array of shared memory, the same in every block.
  size_t static_array(const void* key, size_t bytes);

  // Checked accesses of a block's shared memory, by the running thread or by an engine on its behalf.
  char* shared(Block* block, int64_t offset, size_t bytes, size_t align, bool write, const void* pc,
               const Access* engine = nullptr);
  // The same of global memory.
  void global(const void* address, size_t bytes, size_t align, bool write, const void* pc);
  // cp.async: an access of the running thread's copies, and what it has heard of them.
  Access copier_access(const void* pc);
  void copies_done(int groups);

  std::string name_of(Id id) const;
  [[noreturn]] void fail(const std::string& what) const;

 private:
  friend class SignalScope;
  static void enter(void* thread);
  static void on_signal(int signal, void* info, void* context);

  void reset();
  void start_group(int first_block, int blocks);
  void make_static(Block& block, size_t offset, size_t bytes);
  void schedule();
  void finish(Thread& thread);
  [[noreturn]] void leave();
  // Stops the running thread until wake(); `waits_for` is static text.
  void wait(const char* waits_for, const Place& place);
  void wake(std::vector<Thread*>& threads);
  void end_cluster_phase(Cluster& cluster);
  void end_phase_if_complete(PhaseBarrier& barrier);
  Id new_engine(std::string name);
  void check_peer(Block& block, const Access& access);
  [[noreturn]] void report(Problem problem, const std::string& memory, bool write, const Access& access,
                           const Access& other) const;
  std::string stuck() const;

  Shape shape_;
  std::function<void()> kernel_;
  uint32_t seed_ = 0;
  std::mt19937 generator_;
  std::vector<Stack> stacks_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::deque<Thread*> ready_;
  Thread* running_ = nullptr;
  int alive_ = 0;
  bool progress_ = false;  // the running thread did more than look
  Fiber main_;
  std::exception_ptr fault_;
  const void *signal_address_ = nullptr, *signal_pc_ = nullptr;
  Joiner joiner_;
  Id next_engine_ = 0;
  std::map<Id, std::string> engines_;
  std::map<const void*, std::pair<size_t, size_t>> statics_;  // offsets and bytes
  size_t shared_end_ = 0, static_bytes_ = 0;
  std::map<const void*, Known> counters_;
};

}  // namespace seqattn::emulator
