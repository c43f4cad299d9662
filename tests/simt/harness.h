// SPDX-License-Identifier: Apache-2.0
// Programs of cases: `program NAME SEED` runs a case, with the threads in one of many orders, and
// prints what was wrong; without a name it lists them. Compiled by nvcc, they run on a GPU.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/kd/cuda/device.h"

using namespace kd::cuda;

#ifdef KD_SIMT
inline void* allocate(size_t bytes) { return aligned_alloc(128, (bytes + 127) / 128 * 128); }
inline void release(void* p) { free(p); }
inline void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void new_order(int seed) { simt::settings.seed = 1000 * seed; }
#else
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
inline void new_order(int) {}
#endif

template <class T>
class Array {  // in the device's memory
 public:
  explicit Array(const std::vector<T>& values)
      : size_(values.size()), data_((T*)allocate(size_ * sizeof(T))) {
    copy(data_, values.data(), size_ * sizeof(T));
  }
  explicit Array(size_t size) : Array(std::vector<T>(size)) {}
  Array(const Array&) = delete;
  ~Array() { release(data_); }
  operator T*() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    copy(values.data(), data_, size_ * sizeof(T));
    return values;
  }

 private:
  size_t size_;
  T* data_;
};

inline void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error("not as expected: " + what);
}
template <class T>
void expect_equal(T is, T should, const char* what) {
  expect(is == should, std::string(what) + " is " + std::to_string(is) + ", not " +
                           std::to_string(should));
}

struct Case {
  const char* name;
  void (*run)();
};

inline int run_cases(const std::vector<Case>& cases, int argc, char** argv) {
  for (const Case& c : cases) {
    if (argc < 2) puts(c.name);
    if (argc < 2 || strcmp(c.name, argv[1])) continue;
    try {
      new_order(argc < 3 ? 0 : atoi(argv[2]));
      c.run();
      return 0;
    } catch (const std::exception& error) {
      puts(error.what());
      return 1;
    }
  }
  return argc < 2 ? 0 : 2;
}
