// SPDX-License-Identifier: Apache-2.0
// Mistakes, each of which the simulator has to find: tests/test_simt.py has what it should say.
#include "harness.h"

namespace {

struct Memory {  // of every kernel here
  SharedMemory all = shared_memory();
  Shared<float> a = all.take<float>(64);
  Barriers barriers = all.barriers(2);
};
constexpr size_t shared_bytes = 256 + 16;

void start(Barrier barrier, int count = 1) {
  if (thread_index() == 0) {
    barrier.init(count);
    fence_barriers();
  }
  sync_cluster();
}

}  // namespace

KD_KERNEL(64, 1) void missing_barrier(float* g) {
  const Memory m;
  m.a[thread_index()] = 1;
  g[thread_index()] = m.a[63 - thread_index()];
}
KD_KERNEL(64, 1) void missing_second_barrier(float* g) {  // values are overwritten while still read
  const Memory m;
  for (int k = 0; k < 2; k++) {
    m.a[thread_index()] = k;
    sync_block();
    g[thread_index()] = m.a[63 - thread_index()];
  }
}
KD_KERNEL(64, 1) void missing_warp_barrier(float* g) {  // shuffles order nothing
  const Memory m;
  m.a[thread_index()] = shuffle_xor(1.f, 1);
  g[thread_index()] = m.a[thread_index() ^ 1];
}
KD_KERNEL(64, 1) void warp_barrier_for_block(float* g) {
  const Memory m;
  m.a[thread_index()] = 1;
  sync_warp();
  g[thread_index()] = m.a[63 - thread_index()];
}
KD_KERNEL(64, 1) void missing_wait(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(256);
    copy_async(m.a, g, 64, m.barriers[0]);
  } else {
    m.barriers[0].wait(0);
  }
  g[64 + thread_index()] = m.a[thread_index()];
}
KD_KERNEL(64, 1) void wrong_parity(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(256);
    copy_async(m.a, g, 64, m.barriers[0]);
  }
  m.barriers[0].wait(1);
  g[64 + thread_index()] = m.a[thread_index()];
}
KD_KERNEL(64, 1) void wrong_barrier(float* g) {  // of the two that copies arrive at
  const Memory m;
  start(m.barriers[0]);
  start(m.barriers[1]);
  if (thread_index() == 0) {
    for (int k = 0; k < 2; k++) {
      m.barriers[k].arrive_expecting(128);
      copy_async(m.a.slice(32 * k, 32), g + 32 * k, 32, m.barriers[k]);
    }
  }
  m.barriers[0].wait(0);
  g[64 + thread_index()] = m.a[thread_index()];
}
KD_KERNEL(64, 1) void copy_while_read(float* g) {  // the ring is not known to be empty
  const Memory m;
  start(m.barriers[0]);
  for (int k = 0; k < 2; k++) {
    if (thread_index() == 0) {
      m.barriers[0].arrive_expecting(256);
      copy_async(m.a, g, 64, m.barriers[0]);
    }
    m.barriers[0].wait(k & 1);
    g[64 + thread_index()] = m.a[thread_index()];
  }
}
KD_KERNEL(64, 1) void too_many_bytes_expected(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(256 + 16);
    copy_async(m.a, g, 64, m.barriers[0]);
  }
  m.barriers[0].wait(0);
}
KD_KERNEL(64, 1) void too_few_bytes_expected(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(128);
    copy_async(m.a.slice(0, 32), g, 32, m.barriers[0]);
    copy_async(m.a.slice(32, 32), g, 32, m.barriers[0]);
  }
  m.barriers[0].wait(0);
}
KD_KERNEL(64, 1) void too_many_bytes_land(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(128);
    copy_async(m.a, g, 64, m.barriers[0]);
  }
  m.barriers[0].wait(0);
}
KD_KERNEL(64, 1) void too_many_arrivals(float*) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) m.barriers[0].arrive_expecting(16);
  sync_block();
  if (thread_index() == 1) m.barriers[0].arrive_expecting(16);
}
KD_KERNEL(64, 1) void too_few_arrivals(float*) {
  const Memory m;
  start(m.barriers[0], 3);
  if (thread_index() < 2) m.barriers[0].arrive_expecting(0);
  m.barriers[0].wait(0);
}
KD_KERNEL(64, 1) void unaligned_copy(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) copy_async(m.a.slice(0, 32), g + 1, 32, m.barriers[0]);
}
KD_KERNEL(64, 1) void broken_copy(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) copy_async(m.a, g, 62, m.barriers[0]);
}
KD_KERNEL(64, 1) void unfenced_copy(float* g) {
  const Memory m;
  m.a[thread_index()] = 1;
  start(m.barriers[0]);
  if (thread_index() == 0) copy_async(m.a, g, 64, m.barriers[0]);
}
KD_KERNEL(64, 1) void copy_nobody_waits_for(float* g) {
  const Memory m;
  start(m.barriers[0]);
  if (thread_index() == 0) {
    m.barriers[0].arrive_expecting(256);
    copy_async(m.a, g, 64, m.barriers[0]);
  }
}
KD_KERNEL(64, 1) void unfenced_barrier(float*) {
  const Memory m;
  if (thread_index() == 0) m.barriers[0].init(1);
  sync_block();
  if (thread_index() == 1) m.barriers[0].arrive_expecting(0);
}
KD_KERNEL(64, 1) void barrier_without_init(float*) {
  const Memory m;
  m.barriers[1].wait(0);
}
KD_KERNEL(64, 1) void barrier_before_init(float*) {
  const Memory m;
  if (thread_index() == 32) {
    m.barriers[0].init(1);
    fence_barriers();
  }
  sync_warp();
  if (thread_index() == 0) m.barriers[0].arrive_expecting(0);
}
KD_KERNEL(64, 1) void out_of_bounds(float*) {
  const Memory m;
  m.a[thread_index() + 1] = 1;
}
KD_KERNEL(64, 1) void out_of_slice(float*) {
  const Memory m;
  m.a.slice(16, 16)[thread_index()] = 1;
}
KD_KERNEL(64, 1) void unaligned_pack(float*) {
  const Memory m;
  m.a.set_pack(2, Pack<float, 4>{});
}
KD_KERNEL(64, 1) void unaligned_load(float* g) { g[thread_index()] = load<4>(g + 2).values[0]; }
KD_KERNEL(64, 1) void never_written(float* g) {
  const Memory m;
  if (thread_index() < 63) m.a[thread_index()] = 1;
  sync_block();
  g[thread_index()] = m.a[63 - thread_index()];
}
KD_KERNEL(64, 1) void too_much_memory(float*) { shared_memory().take<double>(64); }
KD_KERNEL(64, 1) void other_layout(float*) {
  SharedMemory memory = shared_memory();
  memory.take<float>(thread_index() == 5 ? 32 : 64);
}
KD_KERNEL(64, 1) void divergent_barrier(float*) {
  if (thread_index() < 16)
    sync_block();
  else
    sync_block();
}
KD_KERNEL(64, 1) void barrier_after_exit(float*) {
  if (thread_index() == 7) return;
  sync_block();
}
KD_KERNEL(64, 1) void missing_lane(float* g) {
  if (lane_index() != 3) g[thread_index()] = shuffle_xor(1.f, 1);
}
KD_KERNEL(64, 1) void other_exchange(float* g) {
  g[thread_index()] = lane_index() < 16 ? (float)vote_bits(true) : shuffle_xor(1.f, 1);
}
KD_KERNEL(64, 1) void half_of_cluster(float*) {
  if (cluster_rank() == 0) sync_cluster();
}
KD_KERNEL(64, 1) void block_barrier_for_cluster(float* g) {
  const Memory m;
  sync_cluster();
  m.a[thread_index()] = 1;
  sync_block();
  g[thread_index()] = remote(m.a, 1 - cluster_rank())[thread_index()];
  sync_cluster();
}
KD_KERNEL(64, 1) void block_not_started(float*) {
  const Memory m;
  if (cluster_rank() == 1) remote(m.a, 0)[thread_index()] = 1;
  sync_cluster();
}
KD_KERNEL(64, 1) void block_ended(float* g) {
  const Memory m;
  m.a[thread_index()] = 1;
  sync_cluster();
  g[thread_index()] = remote(m.a, 1 - cluster_rank())[thread_index()];
}
KD_KERNEL(64, 1) void no_such_block(float*) {
  const Memory m;
  remote(m.a, 2)[thread_index()] = 1;
}
// Nothing is checked in global memory: this shows in the result, if not in every order.
KD_KERNEL(64, 1) void unordered(float* g) {
  const int i = thread_index();
  g[i] = 1;
  g[64 + i] = g[63 - i];
}

namespace {

template <void (*kernel)(float*), int blocks = 1>
void run() {
  Array<float> g(128);
  launch(kernel, Launch{"kernel", blocks, 64, blocks, shared_bytes}, g);
}
void run_unordered() {
  Array<float> g(128);
  launch(unordered, Launch{"kernel", 1, 64}, g);
  for (float x : g.read()) expect_equal(x, 1.f, "number");
}
void launch_of(Launch how) {
  Array<float> g(128);
  launch(unordered, how, g);
}

}  // namespace

#define MISTAKE(f) {#f, run<f>}
#define OF_TWO(f) {#f, run<f, 2>}

int main(int argc, char** argv) {
  return run_cases(
      {
          MISTAKE(missing_barrier), MISTAKE(missing_second_barrier),
          MISTAKE(missing_warp_barrier), MISTAKE(warp_barrier_for_block), MISTAKE(missing_wait),
          MISTAKE(wrong_parity), MISTAKE(wrong_barrier), MISTAKE(copy_while_read),
          MISTAKE(too_many_bytes_expected), MISTAKE(too_few_bytes_expected),
          MISTAKE(too_many_bytes_land), MISTAKE(too_many_arrivals), MISTAKE(too_few_arrivals),
          MISTAKE(unaligned_copy), MISTAKE(broken_copy), MISTAKE(unfenced_copy),
          MISTAKE(copy_nobody_waits_for), MISTAKE(unfenced_barrier),
          MISTAKE(barrier_without_init), MISTAKE(barrier_before_init),
          MISTAKE(out_of_bounds), MISTAKE(out_of_slice), MISTAKE(unaligned_pack),
          MISTAKE(unaligned_load), MISTAKE(never_written), MISTAKE(too_much_memory),
          MISTAKE(other_layout), MISTAKE(divergent_barrier), MISTAKE(barrier_after_exit),
          MISTAKE(missing_lane), MISTAKE(other_exchange), OF_TWO(half_of_cluster),
          OF_TWO(block_barrier_for_cluster), OF_TWO(block_not_started), OF_TWO(block_ended),
          OF_TWO(no_such_block), {"unordered", run_unordered},
          {"launch_threads", [] { launch_of({"kernel", 1, 100}); }},
          {"launch_cluster", [] { launch_of({"kernel", 3, 64, 2}); }},
          {"launch_memory", [] { launch_of({"kernel", 1, 64, 1, 1 << 20}); }},
      },
      argc, argv);
}
