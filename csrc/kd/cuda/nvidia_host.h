// SPDX-License-Identifier: Apache-2.0
// device.h for a GPU, on the host: what the device is, and launches.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "types.h"

namespace kd::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("kdkernels: ") + what + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "which device");
  return device;
}

// Of the current device; asked for once, since the queries cost as much as a launch.
inline const Properties& properties() {
  constexpr int most = 64;
  static Properties known[most] = {};
  const int device = current_device();
  Properties& p = known[device % most];
  if (p.capability == 0) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "device attributes");
      return value;
    };
    p.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    p.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p.shared_in_all = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p.shared_reserved = ask(cudaDevAttrReservedSharedMemoryPerBlock);
    p.capability =
        10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  }
  return p;
}

// A launch as CUDA takes it, of a kernel that may ask for as much shared memory as there is.
struct Config : cudaLaunchConfig_t {
  cudaLaunchAttribute cluster;

  Config(const void* kernel, const Launch& how) : cudaLaunchConfig_t{} {
    if (how.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)properties().shared_bytes),
            how.name);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {(unsigned)how.cluster, 1, 1};
    gridDim = dim3((unsigned)how.blocks);
    blockDim = dim3((unsigned)how.threads);
    dynamicSmemBytes = how.shared_bytes;
    stream = (cudaStream_t)how.stream;
    attrs = &cluster;
    numAttrs = how.cluster > 1;
  }
  Config(const Config&) = delete;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  const Config config((const void*)kernel, how);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), how.name);
}

// Asked for once, as properties().
template <class... Parameters>
int64_t resident(void (*kernel)(Parameters...), const Launch& how) {
  using Layout = std::tuple<int, const void*, int, int, size_t>;
  thread_local std::map<Layout, int64_t> known;
  const void* function = (const void*)kernel;
  const Layout layout(current_device(), function, how.threads, how.cluster, how.shared_bytes);
  const auto found = known.find(layout);
  if (found != known.end()) return found->second;
  const Config config(function, how);
  int n = 0;
  if (how.cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&n, function, &config), how.name);
    n *= how.cluster;
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, function, how.threads,
                                                        how.shared_bytes),
          how.name);
    n *= properties().multiprocessors;
  }
  return known[layout] = n;
}

}  // namespace kd::cuda
