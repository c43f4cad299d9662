// SPDX-License-Identifier: Apache-2.0
// A row from its first sweep to its last: which sweeps it takes, what its cross-entropies and its
// target make of them, and the loss they come to. Included inside a kernel's namespace, as row.h, and
// after divergence.h and KD_KINDS, those of its divergences that the kernel has.
#include "row.h"
#include "cross_entropy.h"
#include "standardize.h"
#include "target.h"
#include "paths.h"

// Whether the slopes of the row are looked at, which are the gradients to its temperatures.
template <class S> KD_ROW bool wants_slopes(const Row<S>& r);
// Of the row's results, each of which one thread writes.
template <class S> KD_ROW void store_loss(const Row<S>& r, double value);
template <class S> KD_ROW void store_row_grad(const Row<S>& r, int which, double value);

// How far apart the logits of a class may be for fp32: powers multiply that, and Renyi's logarithm
// gives the error of a large sum to a small result.
static KD_ROW double exact_range_of(const RowwiseParams& p) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const double power = larger(__builtin_fabs(p.alpha), __builtin_fabs(p.beta));
  if (p.kind == Kind::renyi) return exact_range / 8 / larger(1, power);
  if (p.kind == Kind::ab)
    return exact_range / larger(1, larger(power, __builtin_fabs(p.alpha + p.beta)));
  return exact_range;
}

// Whether the fp32 measures hold; NaN and rows without a finite class do not.
static KD_ROW bool is_exact(const Row<float>& r, double range, bool zero_teacher) {
  const auto usual = [](float z) { return z > floor_of<float> && z < -floor_of<float>; };
  if (r.target_hidden() && !(usual(r.student.at(r.target)) && usual(r.teacher.at(r.target))))
    return false;
  return r.highest < range && (r.lowest > -range || zero_teacher) && r.sum_s < beyond &&
         r.sum_t < beyond && r.k.max_s > floor_of<float> && r.k.max_t > floor_of<float>;
}

static KD_ROW void normalise(Row<float>& r) {
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
static KD_ROW void normalise(Row<double>& r) {
  r.k.inv_sum_s = 1 / r.sum_s, r.k.inv_sum_t = 1 / r.sum_t;
  r.k.log_sum_s = __builtin_log(r.sum_s), r.k.log_sum_t = __builtin_log(r.sum_t);
  r.k.delta = r.k.log_sum_t - r.k.log_sum_s;
}

// The divergence of a measured row, and all its gradients. `centred`: the student's terms of C sum
// to 0, so that its gradient needs no reduction before it.
template <class C, bool centred, class S>
KD_ROW void finish(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  const RowwiseParams& p = r.p;
  const bool gradients = p.grad_student.data || p.grad_teacher.data || p.row_grads;
  if (centred && sizeof(S) == 4 && gradients && !p.grad_teacher.data && !wants_slopes(r) &&
      (!p.standardize || r.student.one_block))
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
  if (infinite) {
    if constexpr (has_nothing<S>) {
      if constexpr (sizeof(S) == 8 && centred) emit<Difference, false>(r, ce, scaling);
      else emit<Nothing, false>(r, ce, scaling);
      r.slope_s = r.slope_t = 0;  // an infinite row moves no temperature
      return;
    }
    r.share = 0;
  }
  emit<C, false>(r, ce, scaling);
  if (!p.standardize) r.add_target_slopes(r.tilt_s, r.tilt_t);
}

template <template <class> class Path, class S>
KD_ROW void finish_kind(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  if constexpr (has_nothing<S>)
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
    KD_KINDS(KD_CASE)
#undef KD_CASE
    default: return;
  }
}

static KD_ROW bool takes_zero_teacher(Kind kind) {
  switch (kind) {
#define KD_CASE(name, K) \
  case Kind::name: return K::zero_teacher;
    KD_KINDS(KD_CASE)
#undef KD_CASE
    default: return false;
  }
}

// A bound of the row's gradients, without its weight.
template <class S>
KD_ROW double largest_gradient(const Row<S>& r, double scale) {
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
KD_ROW void prepare(Row<S>& r, double tau_s, double tau_t) {
  if (r.p.standardize) {
    describe(r);
    // A constant row is uniform at any temperature.
    if (r.student.std > 0) tau_s *= standard_eps + r.student.std;
    if (r.teacher.std > 0) tau_t *= standard_eps + r.teacher.std;
  }
  r.temper(tau_s, tau_t);
  place_target(r, tau_t);
}

template <class S>
KD_ROW void measure_row(Row<S>& r) {
  const Target target = r.p.target;
  const bool teacher_too = target == Target::separate || target == Target::weighting;
  const bool wanted = !r.p.width && (teacher_too || r.p.ce_weight != 0);
  const bool at_one = r.k.inv_ts == 1 && (!teacher_too || r.k.inv_tt == 1);
  const int plain = !wanted || at_one ? 0 : teacher_too ? 2 : 1;
  measure(r, plain);
  if (plain == 0) r.plain_s = r.sum_s, r.plain_t = r.sum_t;
}

// What the target has of its own in the loss, with its weight.
struct Own {
  double value = 0, weight = 0;
};

// The cross-entropies of a measured row, and what they and the target make of the divergence's
// share.
template <class S>
KD_ROW Own account(Row<S>& r, CrossEntropyRow<S>& ce) {
  const RowwiseParams& p = r.p;
  const bool by_teacher = p.target == Target::separate || p.target == Target::weighting;
  r.share = p.kd_weight;
  if (p.ce_weight != 0 || by_teacher)
    ce.measure(p.width ? normaliser_of(r, ce.student, p.classes)
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
  const Normaliser<S> teacher = p.width ? normaliser_of(r, whole, p.classes)
                                        : with_target(r, r.teacher, r.k.max_t, r.plain_t);
  if (!(ce.own.max > floor_of<S> && teacher.max > floor_of<S>)) return {__builtin_nan("")};
  const double log_s = ce.own.log_prob(ce.student.at(p.targets[r.index]));
  const double log_t = teacher.log_prob(whole.at(p.targets[r.index]));
  if (p.target == Target::weighting) {
    const double ratio = log_t < -beyond ? 0 : -log_s / (weighting_eps - log_t);
    r.share *= -__builtin_expm1(-ratio);
    return {};
  }
  const double q = __builtin_exp(log_t);
  return {q == 0 ? 0 : -log_s, p.target_weight * q};
}

template <template <class> class Path, class S>
KD_ROW void finish_row(Row<S>& r, double tau_s, double tau_t) {
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
    if (grad.dtype != DType::float16) return weight * r.factor;
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
  const double nan = __builtin_nan(""), share = r.share;
  const Scaling scaling{!sound ? nan : varies_s ? saved(p.grad_student) * scale * inv_ts : 0,
                        !sound ? nan : varies_t ? saved(p.grad_teacher) * scale * inv_tt : 0};
  if (!sound) r.share = 1;
  if (!has_nothing<S> || sound) finish_kind<Path>(r, ce, scaling);
  else if constexpr (has_nothing<S>) emit<Nothing, false>(r, ce, scaling);
  if (!sound) r.value = r.slope_s = r.slope_t = nan;
  else if (p.target == Target::tempered && p.row_grads) temper_slope(r);

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
  store_loss(r, weight * finite + (infinite && weight != 0 ? __builtin_inf() : 0));
  if (!p.row_grads) return;
  const double factor = weight * r.factor;
  // An infinite row moves no temperature.
  const double tempered = r.infinite || r.value > beyond ? 0 : distilled;
  store_row_grad(r, 0, finite * r.factor);
  store_row_grad(r, 1, factor * ((p.t2 ? 2 * tau_s * tempered : 0) - scale * inv_ts / tau_s * r.slope_s));
  store_row_grad(r, 2, -factor * scale * inv_tt / tau_t * r.slope_t);
  store_row_grad(r, 3, factor / boost);
  if (!p.parts) return;
  store_row_grad(r, 4, factor * own_scale *
                           (p.target == Target::separate ? own_loss / p.target_weight : own.value));
  store_row_grad(r, 5, factor * scale * r.value);
}

template <class S>
KD_ROW void start(Row<S>& row, double tau_s, double tau_t) {
  prepare(row, tau_s, tau_t);
  measure_row(row);
}
