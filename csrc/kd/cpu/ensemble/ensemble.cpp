// SPDX-License-Identifier: Apache-2.0
// KL divergences of M teachers from one student, weighted and summed, or of their mixture; with
// cross-entropy and all gradients, fused. The student's logits are read from memory once for all
// teachers, every teacher's once, and every gradient is written once (fp32, loss and student
// gradient: 4 M + 8 bytes an element); the later sweeps over a row find it in the cache.
//
//   measure  as in rowwise, with the student's exponentials formed once
//   reduce   the divergences, and the sums that centre the teachers' gradients; only for these
//   emit     the gradients, and the divergences if there was no need to reduce
//
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
#include "../rowwise/row.h"
#include "../rowwise/cross_entropy.h"
#include "teachers.h"

// How small the student's probabilities may be for fp32 to divide by them in a mixture.
constexpr float lowest_log_p = -70;

template <class S>
bool is_sound(const Row<S>& r) {
  return r.sum_s < beyond && r.k.max_s > floor_of<S>;
}
template <class S>
bool is_sound(const Teacher<S>& t) {
  return t.sum < beyond && t.k.max_t > floor_of<S>;
}

inline void normalise(const Row<float>& r, Scalars<float>& k, double sum_t, double excess) {
  // A is exact where the normalisers are close, and cancels where the teacher's is much smaller.
  const double ratio = excess / r.sum_s;
  const bool close = __builtin_fabs(ratio) < 0.5;
  k.delta = (float)(close ? __builtin_log1p(ratio) : __builtin_log(sum_t / r.sum_s));
  k.inv_sum_t = (float)(1 / (close ? r.sum_s + excess : sum_t));
}
inline void normalise(const Row<double>& r, Scalars<double>& k, double sum_t, double) {
  k.inv_sum_t = 1 / sum_t;
  k.delta = __builtin_log(sum_t) - __builtin_log(r.sum_s);
}

template <class V>
struct Term {
  V q, gap, d, value;  // p_m, p_m - p_s, log(p_m / p_s) bounded, and the divergence's term
};
template <class V>
KD_FN Term<V> term(const Scalars<float>& k, V p, V s, V t, V exp_t) {
  const V direct = exp_t * k.inv_sum_t, d = log_ratio(k, s, t) - k.delta;
  const auto near = is_near(d);
  const V square = d * d * expm1_tail(d), growth = d + square;  // if near
  const V gap = select(near, p * growth, direct - p), q = select(near, p + gap, direct);
  return {q, gap, d, select(near, gap * d - p * square, q * d - gap)};
}
template <class V>
KD_FN Term<V> term(const Scalars<double>& k, V p, V s, V t, V exp_t) {
  const V off = all<V>(floor_of<double>), q = exp_t * k.inv_sum_t, limit = all<V>(beyond);
  const V ratio = at_most(at_least(log_ratio(k, s, t) - k.delta, -limit), limit);
  const V d = select(s <= off, select(t <= off, V{}, limit), select(t <= off, -limit, ratio));
  const auto near = is_near(d);
  const Exp<V> e = exp_parts(d);
  const V gap = select(near, p * e.minus_one, q - p);
  const V value = select(near, gap * d - p * e.excess, q * d - gap);
  return {q, gap, d, select((s <= off) & (q > V{}), all<V>(__builtin_inf()), value)};
}

// Of the mixture q: its log-ratio to p_s, bounded, and the divergence's term.
template <class V>
struct Mixed {
  V d, value;
};
template <class V>
KD_FN Mixed<V> mixed(const Scalars<float>&, V p, V q, V gap, V) {
  const V divisor = at_least(p, all<V>(1e-37)), e = gap / divisor;
  const Log1p<V> l = log_parts(at_least(q / divisor, all<V>(1e-30)), e);
  return {l.value, select(magnitude(e) < all<V>(0.25), p * (e * l.value - l.excess),
                          q * l.value - gap)};
}
template <class V>
KD_FN Mixed<V> mixed(const Scalars<double>& k, V p, V q, V gap, V s) {
  const V e = gap / at_least(p, all<V>(1e-300)), limit = all<V>(beyond);
  const auto near = magnitude(e) < all<V>(0.25);
  const Log1p<V> l = log_parts(1 + e, e);
  const V log_q = log_parts(at_least(q, all<V>(1e-300)), q - 1).value;
  const V log_p = (s - k.max_s) * k.inv_ts - k.log_sum_s;
  const V d = select(near, l.value, at_most(at_least(log_q - log_p, -limit), limit));
  const V value = select(near, p * (e * l.value - l.excess), q * d - gap);
  const auto lost = (s <= all<V>(floor_of<double>)) & (q > V{});
  return {d, select(lost, all<V>(__builtin_inf()), value)};
}

// A row, its teachers, and what is made of them.
template <class S>
struct Ensemble {
  const EnsembleParams& p;
  Row<S>& r;
  Teacher<S>* teachers;
  int64_t count;
  bool teacher_side;             // a gradient to teachers, or to what is one number a row
  double factor_s = 0, factor_t = 0;  // of the saved gradients, per du of either side
  bool infinite = false;
  double finite = 0;             // what is finite of the loss

  void finish(const CrossEntropyRow<S>& ce) {
    normalise();
    const bool gradients = p.grad_student.data || teacher_side;
    if (gradients && !teacher_side) {
      p.mixture ? pass<true, true, true>(ce) : pass<false, true, true>(ce);
      return settle();
    }
    p.mixture ? pass<true, true, false>(ce) : pass<false, true, false>(ce);
    settle();
    if (gradients) p.mixture ? pass<true, false, true>(ce) : pass<false, false, true>(ce);
  }

  void normalise() {
    bool sound = is_sound(r);
    for (int64_t m = 0; m < count; m++) sound = sound && is_sound(teachers[m]);
    if (!sound) r.sum_s = __builtin_nan("");  // and so is all that is divided by it
    r.k.inv_sum_s = S(1 / r.sum_s), r.k.log_sum_s = S(__builtin_log(r.sum_s));
    for (int64_t m = 0; m < count; m++) {
      Teacher<S>& t = teachers[m];
      kd::KD_ISA::normalise(r, t.k, t.sum, t.excess);
      if (!sound) t.k.inv_sum_t = S(__builtin_nan(""));
    }
  }

  // The loss, and which divergences are infinite: these move nothing but the student.
  void settle() {
    for (int64_t m = 0; m < count; m++) {
      Teacher<S>& t = teachers[m];
      const double value = p.mixture ? r.value : t.value;
      t.infinite = value > beyond;
      infinite = infinite || (t.infinite && (p.mixture || t.weight != 0));
      if (!p.mixture && !t.infinite) finite += t.weight * value;
      t.centre = t.infinite ? 0 : t.centre / t.mass;
    }
    if (p.mixture && !(r.value > beyond)) finite = r.value;
  }

  // `reduces`: the divergences and the teachers' sums; `emits`: the gradients, by those.
  template <bool mixture, bool reduces, bool emits>
  void pass(const CrossEntropyRow<S>& ce) {
    using V = typename VectorOf<S>::V;
    const RowWriter<S> to_s(p.grad_student, r.index, false);
    alignas(64) S buffer_t[block], out[block], q[block];
    S* gap = r.exp_t;
    for_blocks(p.classes, [&](int64_t first, int n) {
      const S* s = r.student.get(first, n);
      const Scalars<S> k = r.k;
      if (p.classes > block)
        sweep<V>(n, [&](int i, auto w) {
          write<V>(r.exp_s + i, w, exp_at_rate(read_logits<V>(s + i, w) - k.max_s, k.rate_s));
        });
      __builtin_memset(gap, 0, n * sizeof(S));
      if (mixture) __builtin_memset(q, 0, n * sizeof(S));
      for (int64_t m = 0; m < count; m++)
        add<mixture, reduces, emits>(teachers[m], first, n, s, buffer_t, gap, q);
      if (mixture) {
        V value{}, slope{};
        sweep<V>(n, [&](int i, auto w) {
          const V z = read_logits<V>(s + i, w), g = read<V>(gap + i, w, S(0));
          const Mixed<V> c = mixed(k, read<V>(r.exp_s + i, w, S(0)) * k.inv_sum_s,
                                   read<V>(q + i, w, S(0)), g, z);
          write<V>(q + i, w, c.d);
          value += c.value, slope -= g * (z - k.max_s);
        });
        if (reduces) r.value += sum(value);
        if (emits) r.slope_s += sum(slope);
        for (int64_t m = 0; teacher_side && m < count; m++) {
          Teacher<S>& t = teachers[m];
          const S* z = t.get(r.index, first, n, buffer_t);
          const auto terms = terms_of<V>(t, s, z);
          V to_weight{};  // less what is the same for all teachers
          teacher<reduces, emits>(t, first, n, z, [&](int i, auto w) {
            const Term<V> c = terms(i, w);
            const V d = read<V>(q + i, w, S(0));
            to_weight += c.gap * d;
            return Share<V>{c.q, d};
          });
          if (reduces) t.value += sum(to_weight);
        }
      }
      if (!emits || !to_s.wanted()) return;
      S* grad = to_s.at(first, out);
      const S factor = S(-factor_s);
      sweep<V>(n, [&](int i, auto w) {
        write<V>(grad + i, w, read<V>(gap + i, w, S(0)) * factor);
      });
      if (ce.wanted) ce.emit(first, n, s, grad);
      to_s.flush(first, n, grad);
    });
  }

  template <class V>
  KD_FN auto terms_of(const Teacher<S>& t, const S* s, const S* z) const {
    const Scalars<S> k = t.k;
    const S *exp_s = r.exp_s, *exps = t.exps;
    return [k, s, z, exp_s, exps, inv_sum_s = r.k.inv_sum_s](int i, auto w) {
      return term(k, read<V>(exp_s + i, w, S(0)) * inv_sum_s, read_logits<V>(s + i, w),
                  read_logits<V>(z + i, w), read<V>(exps + i, w, S(0)));
    };
  }

  // Adds w_m p_m and w_m (p_m - p_s) of a block; in a sum, the divergence and its gradients too.
  template <bool mixture, bool reduces, bool emits>
  void add(Teacher<S>& t, int64_t first, int n, const S* s, S* buffer, S* gap, S* q) {
    using V = typename VectorOf<S>::V;
    const S* z = t.get(r.index, first, n, buffer);
    const Scalars<S> k = t.k;
    S* exps = t.exps;
    if (p.classes > block)
      sweep<V>(n, [&](int i, auto w) {
        write<V>(exps + i, w, exp_at_rate(read_logits<V>(z + i, w) - k.max_t, k.rate_t));
      });
    const S weight = S(t.weight);
    const auto terms = terms_of<V>(t, s, z);
    V value{};
    sweep<V>(n, [&](int i, auto w) {
      const Term<V> c = terms(i, w);
      write<V>(gap + i, w, read<V>(gap + i, w, S(0)) + weight * c.gap);
      if (mixture) write<V>(q + i, w, read<V>(q + i, w, S(0)) + weight * c.q);
      value += c.value;
    });
    if (mixture) return;
    if (reduces) t.value += sum(value);
    if (!teacher_side) return;
    V slope{};
    teacher<reduces, emits>(t, first, n, z, [&](int i, auto w) {
      const Term<V> c = terms(i, w);
      slope -= c.gap * (read_logits<V>(s + i, w) - k.max_s);
      return Share<V>{c.q, c.d};
    });
    if (emits) t.slope_s += sum(slope);
  }

  template <class V>
  struct Share {
    V q, d;  // p_m, and the derivative to it: log(p_m / p_s), or the mixture's
  };
  // A teacher's sums, or its gradients p_m (d - centre), from its Share of every class.
  template <bool reduces, bool emits, class Sides>
  void teacher(Teacher<S>& t, int64_t first, int n, const S* z, const Sides& sides) {
    using V = typename VectorOf<S>::V;
    const RowWriter<S> to_t(t.p->grad, r.index, false);
    alignas(64) S out[block];
    S* grad = emits && to_t.wanted() ? to_t.at(first, out) : out;
    const S max_t = t.k.max_t, centre = S(t.centre);
    const S factor = S(t.infinite ? 0 : t.weight * factor_t);
    V mass{}, weighted{}, slope{};
    sweep<V>(n, [&](int i, auto w) {
      const Share<V> c = sides(i, w);
      if (reduces) mass += c.q, weighted += c.q * c.d;
      if (emits) {
        const V dv = c.q * (c.d - centre);
        write<V>(grad + i, w, dv * factor);
        slope += dv * (read_logits<V>(z + i, w) - max_t);
      }
    });
    if (reduces) t.mass += sum(mass), t.centre += sum(weighted);
    if (emits) t.slope_t += sum(slope);
    if (emits && to_t.wanted()) to_t.flush(first, n, grad);
  }
};

// A power of two for the row's fp16 gradients: half_boost, or less where that might overflow.
template <class S>
double half_boost_of(const Ensemble<S>& e, double tau_s, double tau_t) {
  const EnsembleParams& p = e.p;
  double largest = 0;
  for (int64_t m = 0; m < e.count; m++) {
    const Teacher<S>& t = e.teachers[m];
    double spread = t.highest > -t.lowest ? t.highest : -t.lowest;
    if (!p.teachers[0].grad.data) spread = 0;
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
  for (int64_t m = 0; m < e.count; m++)
    exact = exact && e.teachers[m].highest < exact_range && is_sound(e.teachers[m]);
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
  Row<S> r(p, i);
  r.temper(get(p.tau_s, i), get(p.tau_t, i));
  S* exps = (S*)scratch;
  Teacher<S>* teachers = (Teacher<S>*)(exps + block * p.count);
  Ensemble<S> e{p, r, teachers, gather(p, r, teachers, exps),
                p.row_grads || p.teachers[0].grad.data};
  if (p.ce_weight != 0) measure<true>(r, teachers, e.count);
  else measure<false>(r, teachers, e.count);
  int64_t kept = 0;  // a teacher without weight is left out where it holds no distribution
  for (int64_t m = 0; m < e.count; m++)
    if (teachers[m].weight != 0 || is_sound(teachers[m])) teachers[kept++] = teachers[m];
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
  const int64_t size = p.count * (block * sizeof(double) + sizeof(Teacher<double>));
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
