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
#include "cross_entropy.h"

// How far apart the logits of a class may be for fp32: powers multiply that, and Renyi's logarithm
// gives the error of a large sum to a small result.
inline double exact_range_of(const RowwiseParams& p) {
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const double power = larger(__builtin_fabs(p.alpha), __builtin_fabs(p.beta));
  if (p.kind == Kind::renyi) return exact_range / 8 / larger(1, power);
  if (p.kind == Kind::ab) return exact_range / larger(1, larger(power, __builtin_fabs(p.alpha + p.beta)));
  return exact_range;
}

// Whether the fp32 measures hold; NaN and rows without a finite class do not.
inline bool is_exact(const Row<float>& r, double range, bool zero_teacher) {
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

template <class V>
struct Class {
  V value, student, teacher;  // the divergence's term, and p df/dp of either side, uncentred
  V p_s, p_t;
};

// In fp32 the base is the student throughout.
template <class K>
struct Exact {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<float>& k, V s, V t, V exp_s, V exp_t) {
    const V p = exp_s * k.inv_sum_s, direct = exp_t * k.inv_sum_t;
    const V log_p = (s - k.max_s) * k.inv_ts - k.log_sum_s;
    const V d = log_ratio(k, s, t) - k.delta;
    const auto near = is_near(d);
    const V square = d * d * expm1_tail(d), growth = d + square;  // if near
    const V q = select(near, p + p * growth, direct);
    const V gap = select(near, p * growth, direct - p);
    const V e = select(near, growth, exp(d) - 1.f);
    const Terms<V> f =
        K::terms(Sides<V, decltype(near)>{p, q, gap, d, d, e, p * square, log_p, near}, k.shape);
    return {f.value, f.base, f.other, p, q};
  }
};

template <class V>
struct LogProbs {
  V s, t, p_s, p_t, d;  // d = t - s; infinite where one side is off
  KD_FN LogProbs(const Scalars<double>& k, V zs, V zt, V exp_s, V exp_t) {
    const V us = (zs - k.max_s) * k.inv_ts, ut = (zt - k.max_t) * k.inv_tt;
    const V off = all<V>(floor_of<double>), infinity = all<V>(__builtin_inf());
    s = us - k.log_sum_s, t = ut - k.log_sum_t;
    p_s = exp_s * k.inv_sum_s, p_t = exp_t * k.inv_sum_t;
    d = log_ratio(k, zs, zt) - k.delta;
    d = select(zs <= off, select(zt <= off, V{}, infinity), select(zt <= off, -infinity, d));
  }
};

// In double anything goes: the base is the side with the larger probability.
template <class K>
struct Robust {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, exp_s, exp_t);
    const V zero{};
    const auto student = log.d <= zero;
    const V d = select(student, log.d, -log.d);
    const V p = select(student, log.p_s, log.p_t), q = select(student, log.p_t, log.p_s);
    const auto near = is_near(d);
    const Exp<V> e = exp_parts(d);
    const Sides<V, decltype(near)> sides{
        p, q, select(near, p * e.minus_one, q - p), d, at_least(d, all<V>(Lanes<V>::lowest_exp)),
        e.minus_one, p * e.excess, select(student, log.s, log.t), near};
    const Terms<V> f = K::terms(sides, k.shape), g = K::Swapped::terms(sides, K::swap(k.shape));
    const auto live = p > zero;  // else it contributes nothing, whatever its ratio
    return {select(live, select(student, f.value, g.value), zero),
            select(live, select(student, f.base, g.other), zero),
            select(live, select(student, f.other, g.base), zero), log.p_s, log.p_t};
  }
};

// Renyi where ab's sum may overflow: in logarithms, with the escort distribution w for gradients.
struct RenyiFar {
  template <class V>
  static KD_FN V log_term(const Scalars<double>& k, const LogProbs<V>& log) {
    const V mixed = log.t * k.shape.alpha + log.s * (1 - k.shape.alpha);
    return select(log.d * log.d < all<V>(beyond), mixed, all<V>(floor_of<double>));
  }
  template <class V>
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, exp_s, exp_t);
    const V w = exp(log_term(k, log) - k.log_mixed);
    const double slope = k.shape.alpha / (k.shape.alpha - 1);
    return {V{}, log.p_s - w, slope * (w - log.p_t), log.p_s, log.p_t};
  }
};

// No divergence: its weight is 0, or the row is infinite.
struct Nothing {
  template <class S, class V>
  static KD_FN Class<V> terms(const Scalars<S>&, V, V, V, V) { return {V{}, V{}, V{}, V{}, V{}}; }
};

// What an infinite cross-entropy or forward KL keeps: the student's gradient, p_s - p_t.
struct Difference {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, exp_s, exp_t);
    return {V{}, log.p_s - log.p_t, V{}, log.p_s, log.p_t};
  }
};

template <class C, class S>
void reduce(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  double mass_s = 0, mass_t = 0;
  alignas(64) S buffer_s[block], buffer_t[block];
  for_blocks(r.p.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n, buffer_s);
    const S* t = r.teacher.get(first, n, buffer_t);
    const Scalars<S> k = r.k;
    exponentials(r, n, s, t);
    V value{}, student{}, teacher{}, p_s{}, p_t{};
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const Class<V> c = C::terms(k, zs, zt, read<V>(r.exp_s + i, w, S(0)),
                                  read<V>(r.exp_t + i, w, S(0)));
      value += c.value, student += c.student, teacher += c.teacher;
      p_s += c.p_s, p_t += c.p_t;
    });
    r.value += sum(value), r.centre_s += sum(student), r.centre_t += sum(teacher);
    mass_s += sum(p_s), mass_t += sum(p_t);
  });
  // Over the mass as it was rounded, so that a constant in the terms leaves no trace.
  r.centre_s /= mass_s, r.centre_t /= mass_t;
}

inline void reduce_renyi_far(Row<double>& r) {
  alignas(64) double buffer_s[block], buffer_t[block];
  double most = floor_of<double>, mass = 0, lost = 0;  // lost: teacher mass where the student is off
  for (int pass = 0; pass < 2; pass++)
    for_blocks(r.p.classes, [&](int64_t first, int n) {
      const double* s = r.student.get(first, n, buffer_s);
      const double* t = r.teacher.get(first, n, buffer_t);
      vd high = all<vd>(most), total{}, off{};
      sweep<vd>(n, [&](int i, auto w) {
        const vd zs = read_logits<vd>(s + i, w);
        const vd zt = read_logits<vd>(t + i, w);
        const LogProbs<vd> log(r.k, zs, zt, exp_at_rate(zs - r.k.max_s, r.k.rate_s),
                               exp_at_rate(zt - r.k.max_t, r.k.rate_t));
        const vd term = RenyiFar::log_term(r.k, log);
        if (pass == 0) high = at_least(term, high);
        else total += exp(term - most);
        off += select(zs <= all<vd>(floor_of<double>), log.p_t, vd{});
      });
      most = largest(high), mass += sum(total), lost += sum(off);
    });
  const double alpha = r.k.shape.alpha;
  r.k.log_mixed = most + __builtin_log(mass);
  const bool infinite = most <= floor_of<double> || (alpha > 1 && lost > 0);
  r.value = infinite ? __builtin_inf() : r.k.log_mixed / (alpha - 1);
}

// What the gradients are multiplied by, per du of either side.
struct Scaling {
  double student, teacher;
};

template <class C, bool with_value, class S>
void emit(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  using V = typename VectorOf<S>::V;
  const RowwiseParams& p = r.p;
  const RowWriter<S> to_s(p.grad_student, r.index, p.grad_student.data == p.student.data);
  const RowWriter<S> to_t(p.grad_teacher, r.index, false);
  alignas(64) S buffer_s[block], buffer_t[block], out_s[block], out_t[block];
  for_blocks(p.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n, buffer_s);
    const S* t = r.teacher.get(first, n, buffer_t);
    S* grad_s = to_s.wanted() ? to_s.at(first, out_s) : out_s;
    S* grad_t = to_t.wanted() ? to_t.at(first, out_t) : out_t;
    // Copies that no store can alias.
    const Scalars<S> k = r.k;
    const S centre_s = S(r.centre_s), centre_t = S(r.centre_t);
    const S factor_s = S(scaling.student), factor_t = S(scaling.teacher);
    exponentials(r, n, s, t);
    const bool teacher_too = to_t.wanted() || p.row_grads;
    V value{}, slope_s{}, slope_t{};
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const Class<V> c = C::terms(k, zs, zt, read<V>(r.exp_s + i, w, S(0)),
                                  read<V>(r.exp_t + i, w, S(0)));
      const V du = c.student - c.p_s * centre_s;
      if (with_value) value += c.value;
      write<V>(grad_s + i, w, du * factor_s);
      if (teacher_too) {
        const V dv = c.teacher - c.p_t * centre_t;
        write<V>(grad_t + i, w, dv * factor_t);
        slope_s += du * (zs - k.max_s), slope_t += dv * (zt - k.max_t);
      }
    });
    if (with_value) r.value += sum(value);
    if (teacher_too) r.slope_s += sum(slope_s), r.slope_t += sum(slope_t);
    if (to_s.wanted()) {
      if (ce.wanted) ce.emit(r, first, n, s, grad_s);
      to_s.flush(first, n, grad_s);
    }
    if (to_t.wanted()) to_t.flush(first, n, grad_t);
  });
}

// The divergence of a measured row, and all its gradients. `centred`: the student's terms of C sum
// to 0, so that its gradient needs no reduction before it.
template <class C, bool centred, class S>
void finish(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  const RowwiseParams& p = r.p;
  const bool gradients = p.grad_student.data || p.grad_teacher.data || p.row_grads;
  if (centred && sizeof(S) == 4 && gradients && !p.grad_teacher.data && !p.row_grads)
    return emit<C, true>(r, ce, scaling);

  double growth = 1;  // of Renyi over ab's sum
  if constexpr (__is_same(C, RenyiFar)) {
    reduce_renyi_far(r);
  } else if constexpr (!__is_same(C, Nothing)) {
    reduce<C>(r);
    if (p.kind == Kind::renyi) {
      const double c = p.alpha * (p.alpha - 1);
      growth = p.alpha / (1 + c * r.value);
      scaling.student *= growth, scaling.teacher *= growth;
      r.value = __builtin_log1p(c * r.value) / (p.alpha - 1);
    }
  }
  if (centred) r.centre_s = 0;
  if (r.value > beyond) r.value = __builtin_inf();
  if (!gradients) return;
  if (r.value > beyond) {
    r.centre_s = r.centre_t = 0;
    if constexpr (sizeof(S) == 8 && centred) emit<Difference, false>(r, ce, scaling);
    else emit<Nothing, false>(r, ce, scaling);
    r.slope_s = r.slope_t = 0;
  } else {
    emit<C, false>(r, ce, scaling);
    r.slope_s *= growth, r.slope_t *= growth;
  }
}

template <template <class> class Path, class S>
void finish_kind(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  if (r.p.kd_weight == 0) return finish<Nothing, true>(r, ce, scaling);
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

// A power of two for the row's fp16 gradients: half_boost, or less where that might overflow.
template <class S>
double half_boost_of(const Row<S>& r, double tau_s, double tau_t) {
  const RowwiseParams& p = r.p;
  const bool bounded = (p.kind == Kind::forward_kl && !p.grad_teacher.data) ||
                       p.kind == Kind::tv || p.kind == Kind::js;
  double spread = r.highest > -r.lowest ? r.highest : -r.lowest;
  if (bounded) spread = 0;
  if (!(spread < 1e5)) spread = 1e5;  // its divergence is infinite, and leaves a bounded gradient
  const double tau = tau_s < tau_t ? tau_s : tau_t;
  const double largest = __builtin_fabs(p.kd_weight) * (p.t2 ? tau_s * tau_s : 1) / tau * (1 + spread) +
                         __builtin_fabs(p.ce_weight);
  double boost = half_boost;
  while (boost * largest > 32768 && boost > 1e-30) boost /= 2;
  return boost;
}

template <template <class> class Path, class S>
void finish_row(Row<S>& r) {
  const RowwiseParams& p = r.p;
  const double tau_s = get(p.tau_s, r.index), tau_t = get(p.tau_t, r.index);
  const double weight = get(p.row_weight, r.index), scale = p.t2 ? tau_s * tau_s : 1;
  const double per_loss = p.kd_weight * scale;
  const double boost = half_boost_of(r, tau_s, tau_t);
  const auto saved = [&](const Rows& grad) {
    if (grad.dtype != DType::float16) return weight * p.factor;
    return weight == 0 ? 0 : boost;  // 0 times what has overflowed is not 0
  };
  CrossEntropyRow<S> ce(r);
  if (ce.wanted) {
    ce.coefficient = S(saved(p.grad_student) * p.ce_weight);
    ce.measure(r);
  }
  const Scaling scaling{saved(p.grad_student) * per_loss / tau_s,
                        saved(p.grad_teacher) * per_loss / tau_t};
  const bool sound = r.sum_s < beyond && r.sum_t < beyond && r.k.max_s > floor_of<S> &&
                     r.k.max_t > floor_of<S>;
  if (sound) {
    normalise(r);
    finish_kind<Path>(r, ce, scaling);
  } else {
    const double nan = __builtin_nan("");
    emit<Nothing, false>(r, ce, {nan, nan});
    r.value = r.slope_s = r.slope_t = nan;
  }
  const double loss = (p.kd_weight ? per_loss * r.value : 0) + (ce.wanted ? p.ce_weight * ce.value : 0);
  const bool infinite = loss > beyond || loss < -beyond;
  p.row_loss[r.index] = infinite && weight == 0 ? 0 : weight * loss;
  if (!p.row_grads) return;
  const double factor = weight * p.factor;
  const double value = r.value > beyond ? 0 : r.value;  // an infinite row moves no temperature
  double* out = p.row_grads + r.index;
  out[0] = infinite ? 0 : loss * p.factor;
  out[p.rows] = factor * p.kd_weight *
                ((p.t2 ? 2 * tau_s * value : 0) - scale / (tau_s * tau_s) * r.slope_s);
  out[2 * p.rows] = -factor * p.kd_weight * scale / (tau_t * tau_t) * r.slope_t;
  out[3 * p.rows] = factor / boost;
}

void skip_row(const RowwiseParams& p, int64_t i) {
  p.row_loss[i] = 0;
  RowWriter<float>(p.grad_student, i, true).zero(p.classes);
  RowWriter<float>(p.grad_teacher, i, true).zero(p.classes);
  for (int k = 0; p.row_grads && k < 4; k++) p.row_grads[k * p.rows + i] = 0;
}

template <class S>
void measure_row(Row<S>& r) {
  if (r.p.ce_weight != 0) measure<true>(r);
  else measure<false>(r);
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
    if (!in_double) {
      Row<float> row(p, i);
      measure_row(row);
      if (is_exact(row, range, zero_teacher)) {
        finish_row<Exact>(row);
        continue;
      }
    }
    Row<double> row(p, i);
    measure_row(row);
    finish_row<Robust>(row);
  }
}

}  // namespace KD_ISA
}  // namespace kd
