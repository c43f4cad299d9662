// SPDX-License-Identifier: Apache-2.0
// The types of device.h, alike everywhere.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace kd::cuda {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T values[N];
};

struct Launch {
  const char* name;  // in errors
  int64_t blocks;    // a multiple of `cluster`, below 2^31
  int threads;       // a multiple of 32
  int cluster = 1;   // blocks that share their memory: up to 8
  size_t shared_bytes = 0;
  void* stream = nullptr;  // a cudaStream_t
};

struct Properties {
  int capability;  // 90 for sm_90
  int multiprocessors;
  size_t shared_bytes;  // that a block may ask for
  // Of all blocks of a multiprocessor together, each of which has some more reserved for it.
  size_t shared_in_all = shared_bytes, shared_reserved = 0;

  // Whether so many blocks of a multiprocessor may ask for so much each.
  bool has_shared(int blocks, size_t bytes) const {
    return bytes <= shared_bytes && blocks * (bytes + shared_reserved) <= shared_in_all;
  }
};

constexpr int warp_threads = 32;

}  // namespace kd::cuda
