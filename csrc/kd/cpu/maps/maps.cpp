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
#include "pyramid.h"
#include "spatial_attention.h"

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

inline bool either_in_double(const Rows& a, const Rows& b) {
  return a.dtype == DType::float64 || b.dtype == DType::float64;
}

template <class S>
void attentions(const SpatialAttentionParams& p, int64_t begin, int64_t end) {
  S* maps = (S*)__builtin_malloc(4 * p.student.positions * sizeof(S));
  for (int64_t b = begin; b < end; b++) attention_sample<S>(p, b, maps);
  __builtin_free(maps);
}
void spatial_attention(const SpatialAttentionParams& p, int64_t begin, int64_t end) {
  either_in_double(p.student.rows, p.teacher.rows) ? attentions<double>(p, begin, end)
                                                   : attentions<float>(p, begin, end);
}

template <class S>
void pyramids(const PyramidParams& p, int64_t begin, int64_t end) {
  const int64_t segments = p.y.segments * p.x.segments * pyramid_channels_per_task(p);
  const int64_t numbers = pyramid_line(p) + 2 * segments;
  S* room = (S*)__builtin_malloc(numbers * sizeof(S));
  for (int64_t i = begin; i < end; i++)
    p.channels_last ? pyramid_channels<S>(p, i, room) : pyramid_planes<S>(p, i, room);
  __builtin_free(room);
}
void pyramid(const PyramidParams& p, int64_t begin, int64_t end) {
  either_in_double(p.student, p.teacher) ? pyramids<double>(p, begin, end)
                                         : pyramids<float>(p, begin, end);
}

}  // namespace KD_ISA
}  // namespace kd
