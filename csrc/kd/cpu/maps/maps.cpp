// SPDX-License-Identifier: Apache-2.0
// Losses over feature maps; see the headers for what they fuse.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../maps.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "../../elementwise.h"
#include "elementwise.h"

void elementwise(const ElementParams& p, int64_t begin, int64_t end) {
  const bool in_double =
      p.student.dtype == DType::float64 || p.teacher.dtype == DType::float64;
  for (int64_t task = begin; task < end; task++) {
    switch (p.kind) {
#define KD_TASK(kind, Formula)                                                          \
  case ElementKind::kind:                                                               \
    in_double ? element_task<Formula, double>(p, task) : element_task<Formula, float>(p, task); \
    break;
      KD_ELEMENTS(KD_TASK)
#undef KD_TASK
      case ElementKind::count: break;
    }
  }
}

}  // namespace KD_ISA
}  // namespace kd
