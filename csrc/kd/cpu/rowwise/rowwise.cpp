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
// `exact_range`) takes the same steps in double, where log-normalisers are subtracted plainly.
// Before these, a row may be described (standardised logits are logits at a temperature of the
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
#include "row.h"
#include "standardize.h"
#include "cross_entropy.h"
#include "target.h"
#include "paths.h"
#include "reduce.h"
#include "emit.h"

// How far apart the logits of a class may be for fp32: powers multiply that, and Renyi's logarithm
// gives the error of a large sum to a small result.
inline double exact_range_of(const RowwiseParams& p) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const double power = larger(__builtin_fabs(p.alpha), __builtin_fabs(p.beta));
  if (p.kind == Kind::renyi) return exact_range / 8 / larger(1, power);
  if (p.kind == Kind::ab)
    return exact_range / larger(1, larger(power, __builtin_fabs(p.alpha + p.beta)));
  return exact_range;
}

// Whether the fp32 measures hold; NaN and rows without a finite class do not.
inline bool is_exact(const Row<float>& r, double range, bool zero_teacher) {
  const auto usual = [](float z) { return z > floor_of<float> && z < -floor_of<float>; };
  if (r.target_hidden() && !(usual(r.student.at(r.target)) && usual(r.teacher.at(r.target))))
    return false;
  return r.highest < range && (r.lowest > -range || zero_teacher) && r.sum_s < beyond &&
         r.sum_t < beyond && r.k.max_s > floor_of<float> && r.k.max_t > floor_of<float>;
}

inline void normalise(Row<float>& r) {
  // A is exact where the normalisers are close, and cancels where the teacher's is much smaller.
  const double ratio = r.excess / r.sum_s;
  const bool close = __builtin_fabs(ratio) < 0.5;
  r.k.delta = (float)(close ? __builtin_log1p(ratio) : __builtin_log(r.sum_t / r.sum_s));
  r.k.inv_sum_s = (float)(1 / r.sum_s);
  r.k.inv_sum_t = (float)(1 / (close ? r.sum_s + r.excess : r.sum_t));
  const Kind kind = r.p.kind;  // only these look at log p
  if (kind == Kind::ab || kind == Kind::renyi || kind == Kind::cross_entropy)
    r.k.log_sum_s = (float)__builtin_log(r.sum_s);
}
inline void normalise(Row<double>& r) {
  r.k.inv_sum_s = 1 / r.sum_s, r.k.inv_sum_t = 1 / r.sum_t;
  r.k.log_sum_s = __builtin_log(r.sum_s), r.k.log_sum_t = __builtin_log(r.sum_t);
  r.k.delta = r.k.log_sum_t - r.k.log_sum_s;
}

// The divergence of a measured row, and all its gradients. `centred`: the student's terms of C sum
// to 0, so that its gradient needs no reduction before it.
template <class C, bool centred, class S>
void finish(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  const RowwiseParams& p = r.p;
  const bool gradients = p.grad_student.data || p.grad_teacher.data || p.row_grads;
  if (centred && sizeof(S) == 4 && gradients && !p.grad_teacher.data && !p.row_grads &&
      (!p.standardize || r.classes <= block))
    return emit<C, true>(r, ce, scaling);

  const bool nothing = __is_same(C, Nothing);
  if constexpr (__is_same(C, RenyiFar)) reduce_renyi_far(r);
  if (!nothing || r.shift_s != 0 || r.shift_t != 0) reduce<C>(r);
  if (p.kind == Kind::renyi && !__is_same(C, RenyiFar) && !nothing) {  // a function of ab's sum
    const double c = p.alpha * (p.alpha - 1);
    r.share *= p.alpha / (1 + c * r.value);
    r.value = __builtin_log1p(c * r.value) / (p.alpha - 1);
  }
  if (centred) r.centre_s = 0;
  const bool infinite = r.infinite || r.value > beyond;
  if (r.value > beyond) r.value = __builtin_inf();
  if (infinite) r.centre_s = r.centre_t = r.shift_t = 0;
  if (p.standardize && !infinite) {
    r.slope_s = r.share * (r.slope_s - r.centre_s * r.tilt_s) - r.shift_s * r.tilt_s;
    r.slope_t = r.share * (r.slope_t - r.centre_t * r.tilt_t) - r.shift_t * r.tilt_t;
  }
  if (!gradients) return;
  if (p.standardize && !infinite) {
    r.add_target_slopes(0, 0);
    scaling.spread_s = scaling.student * r.slope_s * r.student.spread;
    scaling.spread_t = scaling.teacher * r.slope_t * r.teacher.spread;
  }
  if (!infinite) {
    emit<C, false>(r, ce, scaling);
    if (!p.standardize) r.add_target_slopes(r.tilt_s, r.tilt_t);
    return;
  }
  if constexpr (sizeof(S) == 8 && centred) emit<Difference, false>(r, ce, scaling);
  else emit<Nothing, false>(r, ce, scaling);
  r.slope_s = r.slope_t = 0;  // an infinite row moves no temperature
}

template <template <class> class Path, class S>
void finish_kind(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  if (r.share == 0 && !r.p.parts) return finish<Nothing, true>(r, ce, scaling);
  if constexpr (sizeof(S) == 8) {
    const double spread = r.highest > -r.lowest ? r.highest : -r.lowest;
    if (r.p.kind == Kind::renyi && spread * (r.p.alpha > 1 ? r.p.alpha : 1) > exact_range / 2)
      return finish<RenyiFar, false>(r, ce, scaling);
  }
  switch (r.p.kind) {
#define KD_CASE(name, K)                                                              \
  case Kind::name:                                                                    \
    return finish<Path<K>, Kind::name == Kind::forward_kl ||                          \
                               Kind::name == Kind::cross_entropy>(r, ce, scaling);
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
    case Kind::count: return;
  }
}

bool takes_zero_teacher(Kind kind) {
  switch (kind) {
#define KD_CASE(name, K) \
  case Kind::name: return K::zero_teacher;
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
    case Kind::count: break;
  }
  return false;
}

// A bound of the row's gradients, without its weight.
template <class S>
double largest_gradient(const Row<S>& r, double scale) {
  const RowwiseParams& p = r.p;
  const bool bounded = ((p.kind == Kind::forward_kl || p.kind == Kind::cross_entropy) && !p.grad_teacher.data) ||
                       p.kind == Kind::tv || p.kind == Kind::js;
  double spread = r.highest > -r.lowest ? r.highest : -r.lowest;
  if (bounded) spread = 0;
  if (!(spread < 1e5)) spread = 1e5;  // its divergence is infinite, and leaves a bounded gradient
  const double shift = __builtin_fabs(r.shift_s) > __builtin_fabs(r.shift_t)
                           ? __builtin_fabs(r.shift_s) : __builtin_fabs(r.shift_t);
  const double share = __builtin_fabs(r.share) + (p.standardize ? 2 : 1) * shift;
  const double inverse = r.k.inv_ts > r.k.inv_tt ? r.k.inv_ts : r.k.inv_tt;
  return share * (p.standardize ? 2 : 1) * scale * inverse * (1 + spread) +
         __builtin_fabs(p.ce_weight) + __builtin_fabs(p.target_weight);
}

// Before the row is measured: its temperatures, and its target in its place.
template <class S>
void prepare(Row<S>& r, double tau_s, double tau_t) {
  if (r.p.standardize) {
    describe(r);
    r.student.read = r.teacher.read = nullptr;
    // A constant row is uniform at any temperature.
    if (r.student.std > 0) tau_s *= standard_eps + r.student.std;
    if (r.teacher.std > 0) tau_t *= standard_eps + r.teacher.std;
  }
  r.temper(tau_s, tau_t);
  place_target(r, tau_t);
}

template <class S>
void measure_row(Row<S>& r) {
  const Target target = r.p.target;
  const bool teacher_too = target == Target::separate || target == Target::weighting;
  const bool wanted = !r.p.width && (teacher_too || r.p.ce_weight != 0);
  if (wanted && !(r.k.inv_ts == 1 && (!teacher_too || r.k.inv_tt == 1)))
    return teacher_too ? measure<2>(r) : measure<1>(r);
  measure<0>(r);
  r.plain_s = r.sum_s, r.plain_t = r.sum_t;
}

// What the target has of its own in the loss, with its weight.
struct Own {
  double value = 0, weight = 0;
};

// The cross-entropies of a measured row, and what they and the target make of the divergence's
// share.
template <class S>
Own account(Row<S>& r, CrossEntropyRow<S>& ce) {
  const RowwiseParams& p = r.p;
  const bool by_teacher = p.target == Target::separate || p.target == Target::weighting;
  r.share = p.kd_weight;
  if (p.ce_weight != 0 || by_teacher)
    ce.measure(p.width ? normaliser_of(ce.student, p.classes)
                       : with_target(r, r.student, r.k.max_s, r.plain_s));
  const bool others_s = r.k.max_s > floor_of<S>, others_t = r.k.max_t > floor_of<S>;
  if (r.target_hidden() && !(others_s && others_t)) {  // nothing to compare the others with
    r.share = 0;
    if (!others_s) r.k.inv_sum_s = 0;
    if (!others_t) r.k.inv_sum_t = 0;
  }
  if (p.target == Target::decoupled) {
    const Decoupled own = decoupled_of(r, others_s, others_t);
    r.infinite = p.target_weight != 0 && own.value > beyond;
    r.shift_s = p.target_weight * own.slope_s, r.shift_t = p.target_weight * own.slope_t;
    return {own.value, p.target_weight};
  }
  if (!by_teacher) return {};
  const RowReader<S> whole{p.teacher, row_offset(p.teacher, r.index)};
  const Normaliser<S> teacher = p.width ? normaliser_of(whole, p.classes)
                                        : with_target(r, r.teacher, r.k.max_t, r.plain_t);
  if (!(ce.own.max > floor_of<S> && teacher.max > floor_of<S>)) return {__builtin_nan("")};
  const double log_s = ce.own.log_prob(ce.logit(p.targets[r.index]));
  S z_t;
  const double log_t = teacher.log_prob(*whole.get(p.targets[r.index], 1, &z_t));
  if (p.target == Target::weighting) {
    const double ratio = log_t < -beyond ? 0 : -log_s / (weighting_eps - log_t);
    r.share *= -__builtin_expm1(-ratio);
    return {};
  }
  const double q = __builtin_exp(log_t);
  return {q == 0 ? 0 : -log_s, p.target_weight * q};
}

template <template <class> class Path, class S>
void finish_row(Row<S>& r, double tau_s, double tau_t) {
  const RowwiseParams& p = r.p;
  const double weight = get(p.row_weight, r.index), scale = p.t2 ? tau_s * tau_s : 1;
  // WSLD looks at its target at temperature 1, where every class is seen.
  const bool has_target = p.target == Target::ordinary ||
                          (p.target == Target::weighting
                               ? p.targets[r.index] >= 0 && p.targets[r.index] < p.classes
                               : r.target_known());
  CrossEntropyRow<S> ce(r);
  Own own;
  bool sound = r.sum_s < beyond && r.sum_t < beyond && has_target &&
               ((r.k.max_s > floor_of<S> && r.k.max_t > floor_of<S>) || r.target_hidden());
  normalise(r);
  if (has_target) own = account(r, ce);
  if (own.value != own.value || r.share != r.share) sound = false;

  const double inv_ts = r.k.inv_ts, inv_tt = r.k.inv_tt;
  const bool half = p.grad_student.dtype == DType::float16 || p.grad_teacher.dtype == DType::float16;
  const double boost = half ? half_boost_for(largest_gradient(r, scale)) : half_boost;
  const auto saved = [&](const Rows& grad) {
    if (grad.dtype != DType::float16) return weight * p.factor;
    return weight == 0 ? 0 : boost;  // 0 times what has overflowed is not 0
  };
  ce.coefficient = S(ce.value == ce.value ? saved(p.grad_student) * p.ce_weight : ce.value);
  if (p.target == Target::separate) {
    ce.target = p.targets[r.index];
    ce.target_coefficient = S(saved(p.grad_student) * own.weight);
  }
  // The gradient of a standardised row that does not vary is 0.
  const bool varies_s = !p.standardize || r.student.std != 0;
  const bool varies_t = !p.standardize || r.teacher.std != 0;
  const Scaling scaling{varies_s ? saved(p.grad_student) * scale * inv_ts : 0,
                        varies_t ? saved(p.grad_teacher) * scale * inv_tt : 0};
  const double share = r.share;
  if (sound) {
    finish_kind<Path>(r, ce, scaling);
    if (p.target == Target::tempered && p.row_grads) temper_slope(r);
  } else {
    const double nan = __builtin_nan("");
    r.share = 1;
    emit<Nothing, false>(r, ce, {nan, nan});
    r.value = r.slope_s = r.slope_t = nan;
  }

  const bool decoupled = p.target == Target::decoupled;
  const double own_scale = decoupled ? scale : 1;
  const double own_loss = own.weight != 0 ? own.weight * own.value : 0;
  const double distilled = (share != 0 || !sound ? share * r.value : 0) + (decoupled ? own_loss : 0);
  // Of an infinite row, its weight sees what is finite.
  double finite = 0;
  bool infinite = false;
  const auto add = [&](double part) {
    if (part > beyond || part < -beyond) infinite = true;
    else finite += part;
  };
  add(scale * distilled);
  if (!decoupled) add(own_loss);
  if (p.ce_weight != 0) add(p.ce_weight * ce.value);
  p.row_loss[r.index] = weight * finite + (infinite && weight != 0 ? __builtin_inf() : 0);
  if (!p.row_grads) return;
  const double factor = weight * p.factor;
  // An infinite row moves no temperature.
  const double tempered = r.infinite || r.value > beyond ? 0 : distilled;
  double* out = p.row_grads + r.index;
  out[0] = finite * p.factor;
  out[p.rows] = factor * ((p.t2 ? 2 * tau_s * tempered : 0) - scale * inv_ts / tau_s * r.slope_s);
  out[2 * p.rows] = -factor * scale * inv_tt / tau_t * r.slope_t;
  out[3 * p.rows] = factor / boost;
  if (!p.parts) return;
  out[4 * p.rows] = factor * own_scale * (p.target == Target::separate ? own_loss / p.target_weight : own.value);
  out[5 * p.rows] = factor * scale * r.value;
}

void skip_row(const RowwiseParams& p, int64_t i) {
  p.row_loss[i] = 0;
  RowWriter<float>(p.grad_student, i, true).zero(p.classes);
  RowWriter<float>(p.grad_teacher, i, true).zero(p.teacher_classes);
  for (int k = 0; p.row_grads && k < (p.parts ? 6 : 4); k++) p.row_grads[k * p.rows + i] = 0;
}

template <class S>
void start(Row<S>& row, double tau_s, double tau_t) {
  prepare(row, tau_s, tau_t);
  measure_row(row);
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
      Row<float> row(p, i);
      start(row, tau_s, tau_t);
      if (is_exact(row, range, zero_teacher)) {
        finish_row<Exact>(row, tau_s, tau_t);
        continue;
      }
    }
    Row<double> row(p, i);
    start(row, tau_s, tau_t);
    finish_row<Robust>(row, tau_s, tau_t);
  }
}

}  // namespace KD_ISA
}  // namespace kd
