// SPDX-License-Identifier: Apache-2.0
// KL divergences of M teachers from one student, weighted and summed, or of their mixture; with
// cross-entropy and all gradients, fused. The student's logits are read from memory once for all
// teachers, every teacher's once, and every gradient is written once (fp32, loss and student
// gradient: 4 M + 8 bytes an element); the later sweeps over a row find it in the cache.
//
//   measure  the maxima, and one exponential a class and side; and class by class, what is exact
//            where a teacher is close to the student, unless its sums show that it is far
//   reduce   the divergences, and the sums that centre the teachers' gradients; only for these
//   emit     the gradients, and the divergences if there was no need to reduce
//
// and rows of one block whose teachers need no gradient, `at_once` after they are measured.
// With e_m = p_m / p_s - 1 exact near 0, a mixture's ratio is 1 + sum w_m e_m: no difference of
// probabilities is formed where they are close. All in fp32; a row that this cannot hold (as in
// rowwise) takes the same steps in double, where log-normalisers are subtracted plainly.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../ensemble.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "../../divergence.h"
#include "../rowwise/side.h"
#include "../../rowwise/row.h"
#include "../../rowwise/cross_entropy.h"
#include "../rowwise/cross_entropy.h"
#include "teachers.h"
#include "terms.h"
#include "passes.h"
#include "at_once.h"

// How small the student's probabilities may be for fp32 to divide by them in a mixture.
constexpr float lowest_log_p = -70;

// A power of two for the row's fp16 gradients: half_boost, or less where that might overflow.
template <class S>
double half_boost_of(const Ensemble<S>& e, double tau_s, double tau_t) {
  const EnsembleParams& p = e.p;
  double largest = 0;
  for (int64_t m = 0; m < e.count; m++) {
    const Teacher<S>& t = e.teachers[m];
    // p_m D, where D is as low as can be, is bounded by p_s; not where it is high.
    double spread = p.teachers[0].grad.data ? t.highest + __builtin_log(1 + e.r.sum_s / t.sum) : 0;
    if (!(spread < 1e5)) spread = 1e5;  // its divergence is infinite, and leaves a bounded gradient
    largest += __builtin_fabs(t.weight) * (1 + spread);
  }
  const double tau = tau_s < tau_t ? tau_s : tau_t;
  largest *= __builtin_fabs(p.kd_weight) * (p.t2 ? tau_s * tau_s : 1) / tau;
  largest += __builtin_fabs(p.ce_weight);
  double boost = half_boost;
  while (boost * largest > 32768 && boost > 1e-30) boost /= 2;
  return boost;
}

template <class S>
void finish_row(Ensemble<S>& e) {
  const EnsembleParams& p = e.p;
  const int64_t i = e.r.index;
  const double tau_s = get(p.tau_s, i), tau_t = get(p.tau_t, i), weight = get(p.row_weight, i);
  const double scale = p.t2 ? tau_s * tau_s : 1, per_loss = p.kd_weight * scale;
  const double boost = half_boost_of(e, tau_s, tau_t);
  const auto saved = [&](const Rows& grad) {
    if (grad.dtype != DType::float16) return weight * p.factor;
    return weight == 0 ? 0 : boost;  // 0 times what has overflowed is not 0
  };
  CrossEntropyRow<S> ce(e.r);
  if (ce.wanted) {
    ce.coefficient = S(saved(p.grad_student) * p.ce_weight);
    ce.measure(Normaliser<S>{e.r.k.max_s, e.r.plain_s});
  }
  e.factor_s = saved(p.grad_student) * per_loss / tau_s;
  e.factor_t = saved(p.teachers[0].grad) * per_loss / tau_t;
  e.finish(ce);
  double finite = per_loss * e.finite;
  bool infinite = e.infinite;
  if (ce.wanted && ce.value > beyond) infinite = true;
  else if (ce.wanted) finite += p.ce_weight * ce.value;
  p.row_loss[i] = infinite && weight != 0 ? __builtin_inf() : weight * finite;
  if (!p.row_grads) return;
  const double factor = weight * p.factor;
  double slope_s = e.p.mixture && !e.infinite ? e.r.slope_s : 0, slope_t = 0;
  for (int64_t m = 0; m < e.count; m++) {
    const Teacher<S>& t = e.teachers[m];
    if (t.infinite) continue;
    slope_s += t.weight * t.slope_s, slope_t += t.weight * t.slope_t;
    p.row_grads[(4 + (t.p - p.teachers)) * p.rows + i] = factor * per_loss * t.value;
  }
  double* out = p.row_grads + i;
  out[0] = finite * p.factor;
  out[p.rows] = factor * p.kd_weight *
                ((p.t2 ? 2 * tau_s * e.finite : 0) - scale / (tau_s * tau_s) * slope_s);
  out[2 * p.rows] = -factor * per_loss / (tau_t * tau_t) * slope_t;
  out[3 * p.rows] = factor / boost;
}

// Whether the fp32 measures hold; NaN and rows without a finite class do not.
inline bool is_exact(const Ensemble<float>& e) {
  bool exact = is_sound(e.r) && (!e.p.mixture || e.r.lowest > lowest_log_p);
  for (int64_t m = 0; m < e.count; m++) {
    const Teacher<float>& t = e.teachers[m];
    exact = exact && t.highest < exact_range && t.bend == t.bend && is_sound(t);
  }
  return exact;
}

// What is not written later: the gradients of teachers that are not looked at, and numbers per row.
inline void clear_row(const EnsembleParams& p, int64_t i, bool counts) {
  for (int64_t m = 0; m < p.count; m++)
    if (!counts || get(p.teachers[m].weight, i) == 0)
      RowWriter<float>(p.teachers[m].grad, i, true).zero(p.classes);
  for (int64_t k = 0; p.row_grads && k < 4 + p.count; k++) p.row_grads[k * p.rows + i] = 0;
  if (counts) return;
  p.row_loss[i] = 0;
  RowWriter<float>(p.grad_student, i, true).zero(p.classes);
}

template <class S>
bool try_row(const EnsembleParams& p, int64_t i, char* scratch) {
  Row<S> r(p, i, p.factor);
  r.temper(get(p.tau_s, i), get(p.tau_t, i));
  S* exps = (S*)scratch;
  Teacher<S>* teachers = (Teacher<S>*)(exps + 3 * block * p.count);
  Ensemble<S> e{p, r, teachers, gather(p, r, teachers, exps),
                p.row_grads || p.teachers[0].grad.data};
  p.mixture ? measure<true>(r, teachers, e.count) : measure<false>(r, teachers, e.count);
  int64_t kept = 0;  // a teacher without weight is left out where it holds no distribution
  for (int64_t m = 0; m < e.count; m++)
    if (teachers[m].weight != 0 || is_sound(teachers[m])) {
      if (kept != m) teachers[kept] = teachers[m];
      kept++;
    }
  e.count = kept;
  if constexpr (sizeof(S) == 4)
    if (!is_exact(e)) return false;
  finish_row(e);
  return true;
}

void ensemble(const EnsembleParams& p, int64_t begin, int64_t end) {
  bool in_double = p.student.dtype == DType::float64;
  for (int64_t m = 0; m < p.count; m++)
    in_double = in_double || p.teachers[m].logits.dtype == DType::float64;
  const int64_t size = p.count * (3 * block * sizeof(double) + sizeof(Teacher<double>));
  char* memory = (char*)__builtin_malloc(size + 64);
  char* scratch = memory + (64 - (uintptr_t)memory % 64);
  for (int64_t i = begin; i < end; i++) {
    const bool counts = row_counts(p, p.ignore_index, i);
    clear_row(p, i, counts);
    if (counts && (in_double || !try_row<float>(p, i, scratch))) try_row<double>(p, i, scratch);
  }
  __builtin_free(memory);
}

}  // namespace KD_ISA
}  // namespace kd
