// SPDX-License-Identifier: Apache-2.0
// device.h for a GPU, on it: CUDA C++ and PTX, compiled by nvcc.
#pragma once
#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#define KD_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define KD_PARAM const __grid_constant__
#define KD_DEVICE __device__ __forceinline__
#define KD_UNROLL _Pragma("unroll")
#define KD_BOTH __host__ __device__ __forceinline__

namespace kd::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KD_SM90 1
#else
#define KD_SM90 0
#endif

// Indices.

KD_DEVICE int thread_index() { return threadIdx.x; }
KD_DEVICE int block_threads() { return blockDim.x; }
KD_DEVICE int block_index() { return blockIdx.x; }
KD_DEVICE int grid_blocks() { return gridDim.x; }
KD_DEVICE int lane_index() { return threadIdx.x % warp_threads; }
KD_DEVICE int warp_index() { return threadIdx.x / warp_threads; }
KD_DEVICE int cluster_rank() {
  int rank = 0;
#if KD_SM90
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Synchronisation and warps.

constexpr unsigned whole_warp = 0xffffffffu;

KD_DEVICE void sync_block() { __syncthreads(); }
KD_DEVICE void sync_warp() { __syncwarp(); }
KD_DEVICE void sync_cluster() {
#if KD_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <class T>
KD_DEVICE T shuffle_xor(T v, int mask) { return __shfl_xor_sync(whole_warp, v, mask); }
KD_DEVICE uint32_t vote_bits(bool p) { return __ballot_sync(whole_warp, p); }

KD_DEVICE void fence_device() { __threadfence(); }
template <class T>
KD_DEVICE T atomic_add(T* p, T v) { return atomicAdd(p, v); }

// Packs are moved as one word, which their elements' types would not promise.

template <int bytes> struct WordOf;
template <> struct WordOf<1> { using type = unsigned char; };
template <> struct WordOf<2> { using type = unsigned short; };
template <> struct WordOf<4> { using type = unsigned int; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<16> { using type = uint4; };
template <class T, int N>
using Word = typename WordOf<sizeof(T) * N>::type;

template <class T, int N>
KD_DEVICE Pack<T, N> from_word(Word<T, N> w) {
  Pack<T, N> v;
  memcpy(&v, &w, sizeof(v));
  return v;
}
template <class T, int N>
KD_DEVICE Word<T, N> to_word(Pack<T, N> v) {
  Word<T, N> w;
  memcpy(&w, &v, sizeof(w));
  return w;
}

// Shared memory.

template <class T>
struct Shared {
  T* data;
  int count;

  KD_DEVICE T& operator[](int i) const { return data[i]; }
  template <int N>
  KD_DEVICE Pack<T, N> pack(int i) const { return from_word<T, N>(*(const Word<T, N>*)(data + i)); }
  template <int N>
  KD_DEVICE void set_pack(int i, Pack<T, N> p) const { *(Word<T, N>*)(data + i) = to_word(p); }
  KD_BOTH Shared slice(int first, int n) const { return {data + first, n}; }
};

KD_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

struct Barrier {
  uint32_t address;

  KD_DEVICE void init(int count) const {
#if KD_SM90
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
#endif
  }
  KD_DEVICE void arrive_expecting(int bytes) const {
#if KD_SM90
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(address), "r"(bytes)
                 : "memory");
#endif
  }
  KD_DEVICE void wait(int parity) const {
#if KD_SM90
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT_%=;\n}" ::"r"(address),
        "r"(parity)
        : "memory");
#endif
  }
};

struct Barriers {
  uint64_t* data;

  KD_DEVICE Barrier operator[](int i) const { return {shared_address(data + i)}; }
};

KD_DEVICE void fence_barriers() {
#if KD_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

class SharedMemory {
 public:
  KD_BOTH explicit SharedMemory(char* base = nullptr) : base_(base) {}
  template <class T>
  KD_BOTH Shared<T> take(int n) {
    return {(T*)reserve(n * sizeof(T)), n};
  }
  KD_BOTH Barriers barriers(int n) { return {(uint64_t*)reserve(n * sizeof(uint64_t))}; }
  KD_BOTH size_t bytes() const { return used_; }

 private:
  KD_BOTH char* reserve(size_t bytes) {
    char* start = base_ + used_;
    used_ += (bytes + 15) / 16 * 16;
    return start;
  }
  char* base_;
  size_t used_ = 0;
};

KD_DEVICE SharedMemory shared_memory() {
  extern __shared__ __align__(128) char kd_shared_memory[];
  return SharedMemory(kd_shared_memory);
}

template <class T>
KD_DEVICE Shared<T> remote(Shared<T> a, int rank) {
#if KD_SM90
  asm("mapa.u64 %0, %1, %2;" : "=l"(a.data) : "l"(a.data), "r"(rank));
#endif
  return a;
}

// Asynchronous copies.

template <class T>
KD_DEVICE void copy_async(Shared<T> to, const T* from, int n, Barrier barrier) {
#if KD_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(to.data)), "l"(__cvta_generic_to_global(from)),
        "r"((int)(n * sizeof(T))), "r"(barrier.address)
      : "memory");
#endif
}
KD_DEVICE void fence_async() {
#if KD_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Global memory.

template <int N, class T>
KD_DEVICE Pack<T, N> load(const T* p) {
  return from_word<T, N>(*(const Word<T, N>*)p);
}
template <class T, int N>
KD_DEVICE void store_once(T* p, Pack<T, N> v) {
  __stcs((Word<T, N>*)p, to_word(v));
}

// Numbers.

KD_DEVICE float to_float(bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
KD_DEVICE float to_float(float16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
template <class T>
KD_DEVICE T from_float(float x) {
  T out;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
}

KD_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
KD_DEVICE float smaller(float a, float b) { return fminf(a, b); }
KD_DEVICE double larger(double a, double b) { return fmax(a, b); }
KD_DEVICE double smaller(double a, double b) { return fmin(a, b); }
KD_DEVICE float larger_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
KD_DEVICE float smaller_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
KD_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kd::cuda
