// SPDX-License-Identifier: Apache-2.0
// Steps of an operator within one parallel region: a fork and a join cost what thousands of
// elements do.
#pragma once
#include <stdint.h>

#include <atomic>
#include <thread>

namespace kd {

// A thread takes tasks that nobody has taken, its own share's first; the step is over when all are
// done. Threads wait for tasks that another is at work on, never for a thread to come: any number
// of them, one after the other even, does all the steps.
class Steps {
 public:
  static constexpr int64_t most_tasks = 64, most_steps = 4;

  // f(task) for every task of a step, by threads that come with shares [begin, end); `backward`:
  // from a share's end, with what the thread did last in the step before.
  template <class F>
  void run(int step, int64_t tasks, int64_t begin, int64_t end, bool backward, const F& f) {
    Step& at = steps[step];
    for (int64_t i = 0; i < tasks; i++) {
      const int64_t task = (backward ? end - 1 - i + tasks : begin + i) % tasks;
      const uint64_t bit = uint64_t{1} << task;
      if (at.taken.load(std::memory_order_relaxed) & bit) continue;
      if (at.taken.fetch_or(bit, std::memory_order_relaxed) & bit) continue;
      f(task);
      at.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; at.done.load(std::memory_order_acquire) < tasks; spins++)
      spins < patience ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int patience = 1 << 12;  // then there are more threads than cores
  struct alignas(64) Step {
    std::atomic<uint64_t> taken{0};
    std::atomic<int64_t> done{0};
  };
  Step steps[most_steps];

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

}  // namespace kd
