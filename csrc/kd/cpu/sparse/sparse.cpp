// SPDX-License-Identifier: Apache-2.0
// Divergences from a teacher that is stored as its k largest values, and their gradients, fused.
// The student's row is read from memory once and its gradient written once (fp32: 8 bytes an
// element); nothing as wide as the row is made for the teacher.
//
//   collect  the stored classes: their values, and a bit for each
//   measure  over the other classes, the tail: the student's exponentials, left where the gradient
//            will be (a row's stays in the cache), and their sum
//   compare  the k + 1 probabilities in double: value and derivatives
//   emit     the gradient: in the tail the exponentials times a factor, then the k stored classes
//
// The tail is summed without the stored classes, which their bits hide from the sweep: what is left
// of 1 is never found as a difference.
#include <stddef.h>
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../sparse.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../../divergence.h"
#include "../sweep.h"

constexpr double infinity = __builtin_inf();

#include "row.h"
#include "measure.h"
#include "compare.h"
#include "emit.h"

template <class S>
void finish(Row<S>& r) {
  const TopKParams& p = r.p;
  const Scratch<S>& w = r.w;
  const double weight = get(p.row_weight, r.index), scale = p.t2 ? r.tau_s * r.tau_s : 1;
  const bool sound = r.sound && student_side(r) && teacher_side(r);
  TeacherSlopes slopes;
  if (sound) {
    differentiate(r);
    if (p.grad_values.data || p.row_grads) slopes = chain_teacher(r);
  } else {
    r.value = slopes.tau = slopes.logsumexp = __builtin_nan("");
    for (int i = 0; i <= r.n; i++) w.to_s[i] = w.to_t[i] = r.value;
  }
  const bool half = p.grad_student.dtype == DType::float16 || p.grad_values.dtype == DType::float16;
  const double boost = half ? half_boost_of(r, scale / r.tau_s, scale) : half_boost;
  const auto saved = [&](const Rows& grad) {
    if (grad.dtype != DType::float16) return weight * p.factor;
    return weight == 0 ? 0 : boost;
  };
  emit_student(r, saved(p.grad_student) * scale / r.tau_s);
  emit_values(r, saved(p.grad_values) * scale);
  const bool infinite = r.value > beyond;
  p.row_loss[r.index] = infinite && weight == 0 ? 0 : weight * scale * r.value;
  if (!p.row_grads) return;
  const double factor = weight * p.factor, value = infinite ? 0 : r.value;
  const double slope_s = !sound ? r.value : infinite ? 0 : student_slope(r);
  double* out = p.row_grads + r.index;
  out[0] = scale * value * p.factor;
  out[p.rows] = factor * ((p.t2 ? 2 * r.tau_s * value : 0) - scale / (r.tau_s * r.tau_s) * slope_s);
  out[2 * p.rows] = -factor * scale / (r.tau_t * r.tau_t) * slopes.tau;
  out[3 * p.rows] = factor * scale * slopes.logsumexp;
  out[4 * p.rows] = factor / boost;
}

void skip_row(const TopKParams& p, int64_t i) {
  p.row_loss[i] = 0;
  p.faults[i] = Fault::none;
  RowWriter<float>(p.grad_student, i, false).zero(p.classes);
  RowWriter<float>(p.grad_values, i, false).zero(p.k);
  for (int k = 0; p.row_grads && k < 5; k++) p.row_grads[k * p.rows + i] = 0;
}

template <class S>
void rows(const TopKParams& p, int64_t begin, int64_t end) {
  Scratch<S> scratch(p);
  for (int64_t i = begin; i < end; i++) {
    if (!row_counts(p, p.ignore_index, i)) {
      skip_row(p, i);
      continue;
    }
    Row<S> r(p, scratch, i);
    collect(r);
    p.faults[i] = r.fault;
    if (r.fault == Fault::none) {
      if (p.missing != Missing::renormalize) p.row_grads ? measure<true>(r) : measure<false>(r);
      finish(r);
    }
    release(r);
  }
}

void sparse(const TopKParams& p, int64_t begin, int64_t end) {
  if (p.student.dtype == DType::float64 || p.values.dtype == DType::float64)
    rows<double>(p, begin, end);
  else rows<float>(p, begin, end);
}

}  // namespace KD_ISA
}  // namespace kd
