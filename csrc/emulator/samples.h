// Small kernels that try the emulator itself: what works, and faults planted one by one.
#pragma once

#include <cstdint>

#include "../cuda/platform.cuh"

namespace seqattn::gpu::samples {

// out[block] = sum of in[block * threads ..], by warps and then through shared memory.
template <class T>
SEQATTN_KERNEL(256)
sum_kernel(const T* in, float* out) {
  const Shared<float> sums = shared_array<float, 32>();
  const float total = warp_sum(to_float(in[block_index() * block_size() + thread_index()]));
  if (lane_index() == 0) sums[warp_index()] = total;
  block_sync();
  if (warp_index() == 0) {
    const float x = warp_sum(lane_index() < block_size() / 32 ? float(sums[lane_index()]) : 0.f);
    if (lane_index() == 0) out[block_index()] = x;
  }
}

// d [16][8] = a [16][k] b [k][8], one warp. Halves come through ldmatrix: a from its rows, b transposed from its rows.
template <class T>
SEQATTN_KERNEL(32)
product_kernel(const T* a, const T* b, float* d, int k) {
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  float sum[4] = {};
  if constexpr (sizeof(T) == 2) {
    const Shared<T> tile_a = dynamic_shared<T>(), tile_b = tile_a + 16 * 16;
    for (int first = 0; first < k; first += 16) {
      warp_sync();
      cp_async<16>(tile_a + 8 * lane, a + (lane / 2) * k + first + lane % 2 * 8);
      if (lane < 16) cp_async<16>(tile_b + 8 * lane, b + (first + lane) * 8);
      cp_async_commit();
      cp_async_wait();
      warp_sync();
      uint32_t fragment_a[4], fragment_b[2];
      ldmatrix<4>(fragment_a, tile_a + lane % 16 * 16 + lane / 16 * 8);
      ldmatrix<2, true>(fragment_b, tile_b + lane % 16 * 8);
      mma_m16n8k16<T>(sum, fragment_a, fragment_b);
    }
  } else {
    for (int first = 0; first < k; first += 8) {
      const T *row = a + g * k + first + q, *below = row + 8 * k, *column = b + (first + q) * 8 + g;
      const uint32_t fragment_a[4] = {to_tf32(row[0]), to_tf32(below[0]), to_tf32(row[4]), to_tf32(below[4])};
      const uint32_t fragment_b[2] = {to_tf32(column[0]), to_tf32(column[4 * 8])};
      mma_m16n8k8(sum, fragment_a, fragment_b);
    }
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}

#define SEQATTN_EXCHANGE_FAULTS(DO)                                                      \
  DO(none, "no fault")                                                                   \
  DO(no_start, "no cluster barrier before the first access of a peer")                   \
  DO(no_wait, "what came from the peer is read at once")                                 \
  DO(other_barrier, "the wait is for the other buffer's barrier")                        \
  DO(few_bytes, "more bytes expected than come")                                         \
  DO(no_end, "no wait for the last stores of others, and no cluster barrier at the end") \
  DO(early_overwrite, "one buffer instead of two")
#define SEQATTN_NAME(name, text) name,
enum class Fault : int { SEQATTN_EXCHANGE_FAULTS(SEQATTN_NAME) };
#undef SEQATTN_NAME

// Every block sends four values of each thread to every block, `steps` times, and goes on with the sums of what came:
// out[block] is the sum of the last four of thread 0.
SEQATTN_KERNEL(64)
exchange_kernel(float* out, int steps, Fault fault) {
  using Value = Vec<float, 4>;
  const Shared<Value> buffers = dynamic_shared<Value>();
  const Shared<Barrier> barriers = shared_array<Barrier, 2>();
  const int i = thread_index(), n = block_size(), peers = cluster_size();
  const uint32_t bytes = static_cast<uint32_t>(peers * n * sizeof(Value));
  if (i == 0) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 1, 1);
    barrier_fence_init();
    barrier_arrive_expect(barriers, bytes + (fault == Fault::few_bytes ? 16 : 0));
    if (steps > 1) barrier_arrive_expect(barriers + 1, bytes);
  }
  if (fault == Fault::no_start) {
    block_sync();
  } else {
    cluster_sync();
  }
  Value x;
  for (int k = 0; k < 4; ++k) x[k] = cluster_rank() + k;
  for (int s = 0; s < steps; ++s) {
    const Shared<Value> buffer = buffers + (fault == Fault::early_overwrite ? 0 : s % 2 * peers * n);
    for (int peer = 0; peer < peers; ++peer) {
      store_async(map_shared(buffer + (cluster_rank() * n + i), peer), x, map_shared(barriers + s % 2, peer));
    }
    const bool other = fault == Fault::other_barrier;
    if (fault == Fault::no_end && s == steps - 1) break;
    if (fault != Fault::no_wait) {
      barrier_wait_cluster(barriers + (other ? 1 - s % 2 : s % 2), other ? 1 - s / 2 % 2 : s / 2 % 2);
    }
    x = Value{};
    for (int peer = 0; peer < peers; ++peer) {
      const Value from = load(buffer + (peer * n + n - 1 - i));
      for (int k = 0; k < 4; ++k) x[k] += from[k];
    }
    block_sync();
    if (i == 0 && s + 2 < steps) barrier_arrive_expect(barriers + s % 2, bytes);
  }
  if (fault != Fault::no_end) cluster_sync();
  if (i == 0) out[block_index()] = x[0] + x[1] + x[2] + x[3];
}

// x + rank goes to the right neighbour, `steps` times, by plain remote stores between the halves of cluster barriers;
// out[0] is what came last, out[1] the same of the right neighbour, read from there.
SEQATTN_KERNEL(32)
remote_kernel(float* out, int steps) {
  const Shared<float> buffer = shared_array<float, 64>();
  const int i = thread_index(), right = (cluster_rank() + 1) % cluster_size();
  cluster_sync();
  float x = 0;
  for (int s = 0; s < steps; ++s) {
    store_remote(map_shared(buffer + (s % 2 * 32 + i), right), x + cluster_rank());
    cluster_arrive();
    cluster_wait();
    x = buffer[s % 2 * 32 + i];
  }
  cluster_sync();
  const float neighbour = load_remote(map_shared(buffer + (steps + 1) % 2 * 32, right));
  cluster_sync();
  if (i == 0) out[block_index()] = x, out[grid_size() + block_index()] = neighbour;
}

// The block's numbers, doubled, in one piece to the right neighbour.
SEQATTN_KERNEL(64)
bulk_kernel(const float* in, float* out, bool fenced) {
  const Shared<float> source = shared_array<float, 64, 0>(), target = shared_array<float, 64, 1>();
  const Shared<Barrier> barriers = shared_array<Barrier, 2>();
  const int i = thread_index(), right = (cluster_rank() + 1) % cluster_size();
  if (i == 0) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 1, 1);
    barrier_fence_init();
    barrier_arrive_expect(barriers, 256);
    bulk_load(source, in + block_index() * 64, 256, barriers);
    barrier_arrive_expect(barriers + 1, 256);
  }
  cluster_sync();
  barrier_wait(barriers, 0);
  source[i] *= 2;
  if (fenced) fence_async();
  block_sync();
  if (i == 0) bulk_copy_to_peer(map_shared(target, right), source, 256, map_shared(barriers + 1, right));
  barrier_wait_cluster(barriers + 1, 0);
  out[block_index() * 64 + i] = target[i];
  cluster_sync();
}

// out[block] = sum of in over all blocks, `steps` times over: x <- sum of all x. `barrier` says whether they wait.
SEQATTN_KERNEL(32)
grid_kernel(Global<float> exchange, uint32_t* counter, float* out, int steps, bool barrier) {
  float x = block_index() + 1.f;
  for (int s = 0; s < steps; ++s) {
    const Global<float> mine = exchange + s % 2 * grid_size();
    if (thread_index() == 0) store_coherent(mine + block_index(), x);
    if (barrier) {
      grid_arrive(counter);
      grid_wait(counter, static_cast<uint32_t>((s + 1) * grid_size()));
    }
    x = 0;
    for (int b = 0; b < grid_size(); ++b) x += load_coherent(mine + b);
  }
  if (thread_index() == 0) out[block_index()] = x;
}

// Votes, shuffles, named barriers, counters: out[thread].
SEQATTN_KERNEL(128)
warps_kernel(const int32_t* in, int32_t* out, int32_t* total) {
  const Shared<int32_t> handed = shared_array<int32_t, 64>();
  const int i = thread_index();
  int32_t x = in[i];
  x += shuffle(x, 3) + shuffle_up(x, 1) + shuffle_down(x, 2) + shuffle_xor(x, 5);
  x += static_cast<int32_t>(ballot(x % 2 != 0) & 0xFF) + warp_any(x == 7) + warp_all(x > -1000000);
  // Warps 0 and 1 hand values to warps 2 and 3.
  if (i < 64) {
    handed[i] = x;
    named_barrier_arrive(1, 128);
  } else {
    named_barrier_sync(1, 128);
    x += handed[i - 64];
  }
  out[i] = x;
  atomic_add(total, warp_max(x));
}

#define SEQATTN_PLANTS(DO)                                                              \
  DO(none, "no fault")                                                                  \
  DO(race_read, "one thread reads what another wrote, without a barrier")               \
  DO(race_write, "two threads write the same place")                                    \
  DO(race_overwrite, "a place is written again while another thread may still read it") \
  DO(race_in_warp, "between lanes, without warp_sync")                                  \
  DO(race_half, "neighbouring halves in a word are no race; the same half is")          \
  DO(uninitialised, "read before any write")                                            \
  DO(past_end, "one element past dynamic shared memory")                                \
  DO(before_start, "one element before it")                                             \
  DO(past_static, "one element past a static array")                                    \
  DO(misaligned, "a vector from an odd place")                                          \
  DO(half_a_block, "block_sync by the first warp only")                                 \
  DO(some_lanes, "block_sync by some lanes of each warp")                               \
  DO(two_places, "lanes of a warp at two different barriers")                           \
  DO(exit_early, "a warp ends, the others wait")                                        \
  DO(named_count, "threads disagree on the count")                                      \
  DO(divergent_shuffle, "half of the lanes shuffle, the others vote")                   \
  DO(missing_lane, "a lane skips the shuffle")                                          \
  DO(copy_not_waited, "cp_async without cp_async_wait")                                 \
  DO(copy_not_shared, "another thread's cp_async without a barrier")                    \
  DO(barrier_not_made, "an mbarrier nobody initialised")                                \
  DO(barrier_overrun, "more arrivals than it counts")                                   \
  DO(global_past_end, "named load past a buffer")                                       \
  DO(global_raw_read, "plain pointer, past it")                                         \
  DO(global_raw_write, "plain pointer, just past it")                                   \
  DO(global_race, "two blocks write one place")                                         \
  DO(stack_overflow, "a recursion without end")                                         \
  DO(spin_for_ever, "a counter nobody raises")
#define SEQATTN_NAME(name, text) name,
enum class Plant : int { SEQATTN_PLANTS(SEQATTN_NAME) };
#undef SEQATTN_NAME

inline __attribute__((noinline)) int deep(int n) {
  volatile char here[4096];
  here[n % 4096] = static_cast<char>(n);
  return n == 0 ? here[0] : deep(n - 1) + here[n % 4096];
}

// 64 threads, 256 bytes of dynamic shared memory; in and out have 64 values, the counter is 0.
SEQATTN_KERNEL(64)
planted_kernel(const float* in, float* out, uint32_t* counter, Plant plant) {
  const Shared<float> s = dynamic_shared<float>();
  const Shared<float> fixed = shared_array<float, 40>();
  const Shared<Barrier> barrier = shared_array<Barrier, 1>();
  const int i = thread_index(), lane = lane_index();
  float x = in[i];
  const auto is = [&](Plant p) { return plant == p; };
  if (!is(Plant::uninitialised)) s[i] = 0;
  block_sync();
  x += s[63 - i];
  block_sync();

  s[i] = x;
  if (!is(Plant::race_read)) block_sync();
  x = s[63 - i];
  block_sync();
  s[i] = x;
  if (is(Plant::race_write)) s[i / 2] = x;
  block_sync();
  x = s[63 - i];
  if (!is(Plant::race_overwrite)) block_sync();
  s[i] = x + 1;
  if (!is(Plant::race_in_warp)) warp_sync();
  x += s[i ^ 1];
  block_sync();
  const Shared<half> halves = shared_cast<half>(s);
  halves[is(Plant::race_half) ? i / 2 : i] = from_float<half>(x);
  block_sync();

  if (is(Plant::past_end) && i == 63) x += s[i + 1];
  if (is(Plant::before_start) && i == 0) s[i - 1] = x;
  if (is(Plant::past_static) && i == 40) fixed[i] = x;
  if (is(Plant::misaligned)) x += load(shared_cast<Vec<float, 4>>(s + 1))[0];
  block_sync();

  if (is(Plant::half_a_block) && i < 32) block_sync();
  if (is(Plant::some_lanes) && lane < 16) block_sync();
  if (is(Plant::two_places)) {
    if (lane < 16) {
      block_sync();
    } else {
      block_sync();
    }
  }
  if (is(Plant::exit_early) && i >= 32) return;
  if (is(Plant::named_count)) named_barrier_sync(2, i < 32 ? 32 + 32 : 32);
  if (is(Plant::divergent_shuffle)) x += lane < 16 ? shuffle_xor(x, 1) : float(ballot(true));
  if (is(Plant::missing_lane) && lane != 5) x += shuffle_xor(x, 1);
  block_sync();

  cp_async<4>(s + i, in + i);
  cp_async_commit();
  if (!is(Plant::copy_not_waited)) cp_async_wait();
  x += s[i];
  if (!is(Plant::copy_not_shared)) block_sync();
  x += s[i ^ 1];
  block_sync();

  if (i == 0 && !is(Plant::barrier_not_made)) barrier_init(barrier, is(Plant::barrier_overrun) ? 1 : 64);
  block_sync();
  if (is(Plant::barrier_overrun) && i == 0) {
    barrier_arrive_expect(barrier, 16);
  } else {
    barrier_arrive(barrier);
  }
  barrier_wait(barrier, 0);

  if (is(Plant::global_past_end)) x += load_readonly(in + i + 1);
  if (is(Plant::global_raw_read)) x += in[i + 64];
  if (is(Plant::global_raw_write)) out[i + 1] = x;
  if (is(Plant::global_race)) store_streaming(out, x);
  if (is(Plant::stack_overflow)) x += deep(1 << 12);
  if (is(Plant::spin_for_ever)) {
    SpinGuard guard;
    while (load_acquire(counter) == 0) guard.spin();
  }
  out[i] = x;
}

}  // namespace seqattn::gpu::samples
