// SPDX-License-Identifier: Apache-2.0
// Stacks that take turns on one operating-system thread, known to AddressSanitizer.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kd::cuda::simt {

class Fiber {
 public:
  Fiber() = default;  // of the caller's stack: only to come back to
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_, guard + size);
  }

  // `entry` has to end by leaving this fiber for good.
  void start(void (*entry)()) {
    if (!stack_) {
      void* p = mmap(nullptr, guard + size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      stack_ = static_cast<char*>(p);
      mprotect(stack_, guard, PROT_NONE);
      bottom_ = stack_ + guard;
      size_ = size;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom_, size_);  // what ran here may have been left half-way
    fake_ = nullptr;
#endif
    getcontext(&context_);
    context_.uc_stack.ss_sp = const_cast<void*>(bottom_);
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    starts_ = true;
  }

  void switch_to(Fiber& next, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, next.bottom_, next.size_);
#endif
    came_from = this;
    if (_setjmp(jump_) == 0) {  // unlike swapcontext, this asks nothing of the kernel
      if (!next.starts_) _longjmp(next.jump_, 1);
      next.starts_ = false;
      setcontext(&next.context_);
    }
    arrived(*this);
  }

  // The first thing a fiber does.
  static void arrived([[maybe_unused]] Fiber& here) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(here.fake_, &came_from->bottom_, &came_from->size_);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t size = 256 << 10;
  void* fake_ = nullptr;
#else
  static constexpr size_t size = 64 << 10;
#endif
  static constexpr size_t guard = 4 << 10;
  static inline Fiber* came_from = nullptr;
  ucontext_t context_;
  jmp_buf jump_;
  bool starts_ = false;
  char* stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kd::cuda::simt
