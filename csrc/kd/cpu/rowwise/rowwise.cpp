// SPDX-License-Identifier: Apache-2.0
// Row-wise softmax divergences, cross-entropy, and their gradients, fused: every logit is read from
// memory once and every gradient written once (fp32, loss and student gradient: 12 bytes an
// element); the later sweeps over a row find it in the cache.
//
//   measure  the maxima; S = sum exp(u_s) and A = sum exp(u_s) expm1(u_t - u_s), block by block,
//            re-centred where a maximum moves: delta = log1p(A / S) is then the difference of the
//            log-normalisers without cancellation
//   reduce   the loss, and the sums that centre the gradients; not needed for the student's
//            gradient of forward KL, whose sum is 0
//   emit     the gradients
//
// all in fp32. A row that this cannot hold (fp64 input, -inf on one side, a log-ratio beyond
// `exact_range`) takes the same steps in double, where log-normalisers are subtracted plainly. The
// sweeps are here, what they come to is in kd/rowwise. Before these, a row may be described (standardised logits are logits at a temperature of the
// row's own, whose gradient goes through its deviation), and its target placed (target.h).
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../rowwise.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "../../divergence.h"
#include "side.h"

#define KD_KINDS KD_DIVERGENCES
#include "../../rowwise/finish.h"

#include "measure.h"
#include "standardize.h"
#include "cross_entropy.h"
#include "reduce.h"
#include "emit.h"

template <class S>
bool wants_slopes(const Row<S>& r) {
  return r.p.row_grads;
}
template <class S>
void store_loss(const Row<S>& r, double value) {
  r.p.row_loss[r.index] = value;
}
template <class S>
void store_row_grad(const Row<S>& r, int which, double value) {
  r.p.row_grads[which * r.p.rows + r.index] = value;
}

void skip_row(const RowwiseParams& p, int64_t i) {
  p.row_loss[i] = 0;
  RowWriter<float>(p.grad_student, i, true).zero(p.classes);
  RowWriter<float>(p.grad_teacher, i, true).zero(p.teacher_classes);
  for (int k = 0; p.row_grads && k < (p.parts ? 6 : 4); k++) p.row_grads[k * p.rows + i] = 0;
}

void rowwise(const RowwiseParams& p, int64_t begin, int64_t end) {
  const bool in_double = p.student.dtype == DType::float64 || p.teacher.dtype == DType::float64;
  const bool zero_teacher = takes_zero_teacher(p.kind);
  const double range = exact_range_of(p);
  for (int64_t i = begin; i < end; i++) {
    if (!row_counts(p, p.ignore_index, i)) {
      skip_row(p, i);
      continue;
    }
    const double tau_s = get(p.tau_s, i), tau_t = get(p.tau_t, i);
    if (!in_double) {
      Row<float> row(p, i, p.factor);
      start(row, tau_s, tau_t);
      if (is_exact(row, range, zero_teacher)) {
        finish_row<Exact>(row, tau_s, tau_t);
        continue;
      }
    }
    Row<double> row(p, i, p.factor);
    start(row, tau_s, tau_t);
    finish_row<Robust>(row, tau_s, tau_t);
  }
}

}  // namespace KD_ISA
}  // namespace kd
