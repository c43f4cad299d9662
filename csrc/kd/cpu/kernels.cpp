// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include "../contract.h"

#include <cstdlib>
#include <cstring>

// One set of kernels per level that the build compiled (see ISA_LEVELS in setup.py).
#define KD_DECLARE(name, arguments) void name arguments;
namespace kd::baseline { KD_KERNELS(KD_DECLARE) }
#ifdef KD_X86
namespace kd::avx2 { KD_KERNELS(KD_DECLARE) }
namespace kd::avx512 { KD_KERNELS(KD_DECLARE) }
#endif

namespace kd {
namespace {

#define KD_ENTRY(name, arguments) name,
Kernels baseline_level() {
  using namespace baseline;
  return {"baseline", KD_KERNELS(KD_ENTRY)};
}
#ifdef KD_X86
Kernels avx2_level() {
  using namespace avx2;
  return {"avx2", KD_KERNELS(KD_ENTRY)};
}
Kernels avx512_level() {
  using namespace avx512;
  return {"avx512", KD_KERNELS(KD_ENTRY)};
}
const Kernels levels[] = {baseline_level(), avx2_level(), avx512_level()};
#else
const Kernels levels[] = {baseline_level()};
#endif

int best_level() {
#ifdef KD_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

const Kernels& choose() {
  int level = best_level();
  if (const char* wanted = std::getenv("KDKERNELS_CPU_CAPABILITY"))
    for (int i = 0; i <= level; i++)
      if (!std::strcmp(wanted, levels[i].isa)) level = i;
  return levels[level];
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace kd
