// SPDX-License-Identifier: Apache-2.0
// device.h for the simulator: the same names as in kd/cuda/nvidia*.h, for any C++17 compiler.
#pragma once
#include <math.h>
#include <string.h>

#include <tuple>

#include "machine.h"

#define KD_KERNEL(threads, blocks) static
#define KD_PARAM const
#define KD_DEVICE inline
#define KD_BOTH inline
#define KD_UNROLL
#define KD_HERE simt::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace kd::cuda {

// Indices.

inline int thread_index() { return simt::here().index; }
inline int block_threads() { return simt::machine->how().threads; }
inline int block_index() { return simt::here().block->index; }
inline int grid_blocks() { return (int)simt::machine->how().blocks; }
inline int lane_index() { return thread_index() % warp_threads; }
inline int warp_index() { return thread_index() / warp_threads; }
inline int cluster_rank() { return simt::here().block->rank; }

// Synchronisation and warps.

inline void sync_block(KD_HERE) { simt::machine->sync_block(site); }
inline void sync_warp(KD_HERE) { simt::machine->sync_warp(site); }
inline void sync_cluster(KD_HERE) { simt::machine->sync_cluster(site); }

namespace simt {
template <class T>
T exchange(const char* what, T v, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t word = 0;
  memcpy(&word, &v, sizeof(T));
  word = machine->exchange(what, word, source, site);
  memcpy(&v, &word, sizeof(T));
  return v;
}
}  // namespace simt

template <class T>
T shuffle_xor(T v, int mask, KD_HERE) {
  return simt::exchange("shuffle_xor", v, (lane_index() ^ mask) & 31, site);
}
inline uint32_t vote_bits(bool p, KD_HERE) {
  return (uint32_t)simt::machine->exchange("vote", p, -1, site);
}

inline void fence_device() {}
template <class T>
T atomic_add(T* p, T v) {
  const T before = *p;
  *p = before + v;
  return before;
}

// Shared memory.

template <class T>
struct Shared {
  simt::Region* region;
  int first, count;

  class Element {  // stands for T&, and is told whether it is read or written
   public:
    Element(const Shared& array, int i) : array_(array), i_(i) {}
    operator T() const { return array_.template get<T>(i_, 1); }
    T operator=(T v) const { return array_.set(i_, 1, v), v; }
    T operator=(const Element& e) const { return *this = T(e); }

   private:
    const Shared& array_;
    int i_;
  };

  Element operator[](int i) const { return {*this, i}; }
  template <int N>
  Pack<T, N> pack(int i) const {
    return get<Pack<T, N>>(aligned(i, N), N);
  }
  template <int N>
  void set_pack(int i, Pack<T, N> p) const {
    set(aligned(i, N), N, p);
  }
  Shared slice(int from, int n) const {
    if (from < 0 || n < 0 || from + n > count) outside(from, n);
    return {region, first + from, n};
  }

  // For n elements at once.
  template <class P>
  P get(int i, int n) const {
    if (i < 0 || i + n > count) outside(i, n);
    region->read(first + i, n);
    P p;
    memcpy(&p, region->at(first + i), sizeof(P));
    return p;
  }
  template <class P>
  void set(int i, int n, const P& p) const {
    if (i < 0 || i + n > count) outside(i, n);
    region->write(first + i, n);
    memcpy(region->at(first + i), &p, sizeof(P));
  }
  int aligned(int i, int n) const {
    if ((region->offset + (first + i) * sizeof(T)) % (n * sizeof(T)))
      simt::fail("needs ", n, " elements of shared memory aligned");
    return i;
  }
  [[noreturn]] void outside(int i, int n) const {
    simt::fail("uses elements ", i, " to ", i + n - 1, " of a shared array of ", count);
  }
};

struct Barrier {
  size_t offset;

  void init(int count) const { simt::machine->init(offset, count); }
  void arrive_expecting(int bytes, KD_HERE) const {
    simt::machine->arrive(state(), bytes, site);
  }
  void wait(int parity, KD_HERE) const { simt::machine->wait(state(), parity, site); }
  simt::BarrierState& state() const {
    return simt::machine->barrier(offset);
  }
};

struct Barriers {
  size_t offset;
  int count;

  Barrier operator[](int i) const {
    if (i < 0 || i >= count) simt::fail("uses barrier ", i, " of ", count);
    return {offset + i * sizeof(uint64_t)};
  }
};

inline void fence_barriers() {
  simt::Thread& t = simt::here();
  t.fenced_barriers = t.tick++;
}

class SharedMemory {
 public:
  explicit SharedMemory(simt::Block* block = nullptr) : block_(block) {}
  template <class T>
  Shared<T> take(int n) {
    const size_t offset = reserve(n * sizeof(T));
    return {block_ ? &block_->region(offset, n, sizeof(T)) : nullptr, 0, n};
  }
  Barriers barriers(int n) {
    const size_t offset = reserve(n * sizeof(uint64_t));
    if (block_) block_->region(offset, n, sizeof(uint64_t));
    return {offset, n};
  }
  size_t bytes() const { return used_; }

 private:
  size_t reserve(size_t bytes) {
    const size_t start = used_;
    used_ += (bytes + 15) / 16 * 16;
    return start;
  }
  simt::Block* block_;
  size_t used_ = 0;
};

inline SharedMemory shared_memory() { return SharedMemory(simt::here().block); }

template <class T>
Shared<T> remote(Shared<T> a, int rank) {
  const simt::Region& own = *a.region;
  return {&simt::machine->block(rank).region(own.offset, own.count, own.element), a.first, a.count};
}

// Asynchronous copies.

namespace simt {
inline void need_aligned(const void* p, size_t bytes) {
  if ((uintptr_t)p % bytes) fail("needs an address aligned to ", bytes, " bytes");
}
}  // namespace simt

template <class T>
void copy_async(Shared<T> to, const T* from, int n, Barrier barrier) {
  if (n < 1 || n > to.count) to.outside(0, n);
  simt::need_aligned(from, 16);
  if (n * sizeof(T) % 16 || (to.region->offset + to.first * sizeof(T)) % 16)
    simt::fail("copies by whole and aligned 16 bytes only");
  simt::machine->issue({to.region, to.first, n, from, &barrier.state()});
}
inline void fence_async() {
  simt::Thread& t = simt::here();
  t.fenced = t.tick++;
}

// Global memory.

template <int N, class T>
Pack<T, N> load(const T* p) {
  simt::need_aligned(p, sizeof(T) * N);
  Pack<T, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class T, int N>
void store_once(T* p, Pack<T, N> v) {
  simt::need_aligned(p, sizeof(T) * N);
  memcpy(p, &v, sizeof(v));
}

// Numbers.

namespace simt {
#define KD_FN inline
#include "../../kd/half.h"
#undef KD_FN

// As wrong as the instruction may be, in a way that depends on the bits only.
inline float approximate(float y, uint32_t seed) {
  const float off = (float)(seed * 2654435761u >> 8) / (1 << 23) - 1;  // in [-1, 1)
  return fabsf(y) < 1.17549435e-38f ? copysignf(0, y) : y + y * off * 0x1.4p-23f;
}
}  // namespace simt

inline float to_float(bfloat16 x) { return simt::from_bfloat16(x.bits); }
inline float to_float(float16 x) { return simt::from_float16(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) return {simt::to_bfloat16(x)};
  else return {simt::to_float16(x)};
}

template <class S>
S larger(S a, S b) { return b > a || a != a ? b : a; }
template <class S>
S smaller(S a, S b) { return b < a || a != a ? b : a; }
inline float larger_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline float smaller_or_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }
inline float exp2_approx(float x) { return simt::approximate(exp2f(x), simt::to_bits(x)); }

// Host.

inline const Properties& properties() { return simt::settings.properties; }

template <class... Parameters>
int64_t resident(void (*)(Parameters...), const Launch& how) {
  const int clusters = 2 * properties().multiprocessors / how.cluster;
  return (clusters > 1 ? clusters : 1) * how.cluster;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  simt::run(how, [&] { std::apply(kernel, values); });
}

}  // namespace kd::cuda
