// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <cstdlib>
#include <cstring>

// One set of kernels per level that the build compiled (see ISA_LEVELS in setup.py).
#define KD_DECLARE(isa)                                               \
  namespace kd::isa {                                                 \
  void rowwise(const RowwiseParams&, int64_t, int64_t);               \
  void scale_row(const Rows&, int64_t, int64_t, double);              \
  }
KD_DECLARE(baseline)
#ifdef KD_X86
KD_DECLARE(avx2)
KD_DECLARE(avx512)
#endif

namespace kd {
namespace {

#define KD_LEVEL(isa) Kernels{#isa, isa::rowwise, isa::scale_row}

const Kernels levels[] = {
    KD_LEVEL(baseline),
#ifdef KD_X86
    KD_LEVEL(avx2),
    KD_LEVEL(avx512),
#endif
};

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
