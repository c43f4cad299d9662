// SPDX-License-Identifier: Apache-2.0
// Attention of classes to classes, fused: softening, scores, softmax, mean and residual, and their
// gradients. Eager holds several N x K x K maps; here a pair of classes is a few instructions and an
// exponential in registers, and memory grows with N x K.
//
// A task takes a few rows of the score matrix through all samples, so that the rows stay in cache
// (the matrix is read once a call) and their gradient has one owner, which adds the samples up in
// their order:
//
//   soften    s = teacher / temperature, padded to whole vectors
//   forward   per row and sample a sweep for the largest score and one for the sums
//   backward  the same scores again, and the gradients of the coefficients
//   collect   what several tasks have added to, summed in the order of the tasks
//   teacher   the gradient to the teacher, sample by sample; a frozen teacher skips it
//
// Sums over samples are double where they are single numbers, and fp32 per element.
#include <stdint.h>

#include <new>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../attention.h"
#include "../../product.h"
#include "../../row_attention.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "product.h"
#include "rows.h"
#include "scores.h"
#include "forward.h"
#include "backward.h"
#include "teacher.h"

template <class S>
void soften(const ClassAttention& p, int64_t sample) {
  const int64_t width = padded(p.classes);
  S* soft = (S*)p.soft + sample * width;
  const S inverse = (S)(1 / get(p.temperature, sample));
  const RowReader<S> reader{p.teacher, row_offset(p.teacher, sample)};
  bool some_off = false;
  S buffer[block];
  for_blocks(p.classes, [&](int64_t first, int n) {
    const S* z = reader.get(first, n, buffer);
    for (int i = 0; i < n; i++) {
      some_off |= z[i] <= floor_of<S>;
      soft[first + i] = z[i] <= floor_of<S> ? floor_of<S> : z[i] * inverse;
    }
  });
  for (int64_t j = p.classes; j < width; j++) soft[j] = 0;
  p.some_off[sample] = some_off;
}

template <class S>
void step(const ClassAttention& p, AttentionStep step, int64_t task) {
  switch (step) {
    case AttentionStep::soften: return soften<S>(p, task);
    case AttentionStep::forward: return forward<S>(p, task);
    case AttentionStep::backward: return backward<S>(p, task);
    case AttentionStep::collect: return collect<S>(p, task);
    case AttentionStep::teacher: return teacher<S>(p, task);
  }
}

void attention(const ClassAttention& p, AttentionStep which, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; task++) {
    if (p.in_double) step<double>(p, which, task);
    else step<float>(p, which, task);
  }
}

}  // namespace KD_ISA
}  // namespace kd
