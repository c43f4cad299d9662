// SPDX-License-Identifier: Apache-2.0
// A class's terms of the divergence and their derivatives, in fp32 (`Exact`) and in double for any
// input (`Robust`, and what stands in for it).

template <class V>
struct Class {
  V value, student, teacher;  // the divergence's term, and p df/dp of either side, uncentred
  V p_s, p_t;
};

// `terms` takes a class's logits, log_ratio of them, exp(u_s) and exp(u_t).

// In fp32 the base is the student throughout.
template <class K>
struct Exact {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<float>& k, V s, V, V ratio, V exp_s, V exp_t) {
    const V p = exp_s * k.inv_sum_s, direct = exp_t * k.inv_sum_t;
    const V log_p = (s - k.max_s) * k.inv_ts - k.log_sum_s;
    const V d = ratio - k.delta;
    const auto near = is_near(d);
    const V square = d * d * expm1_tail(d), p_excess = p * square;  // if near
    const V gap = select(near, p * d + p_excess, direct - p);
    const V q = select(near, p + gap, direct);
    const V e = select(near, d + square, exp(d) - 1.f);
    const Terms<V> f =
        K::terms(Sides<V, decltype(near)>{p, q, gap, d, d, e, p_excess, log_p, near}, k.shape);
    return {f.value, f.base, f.other, p, q};
  }
};

template <class V>
struct LogProbs {
  V s, t, p_s, p_t, d;  // d = t - s; infinite where one side is off
  KD_FN LogProbs(const Scalars<double>& k, V zs, V zt, V ratio, V exp_s, V exp_t) {
    const V us = (zs - k.max_s) * k.inv_ts, ut = (zt - k.max_t) * k.inv_tt;
    const V off = all<V>(floor_of<double>), infinity = all<V>(__builtin_inf());
    s = us - k.log_sum_s, t = ut - k.log_sum_t;
    p_s = exp_s * k.inv_sum_s, p_t = exp_t * k.inv_sum_t;
    d = ratio - k.delta;
    d = select(zs <= off, select(zt <= off, V{}, infinity), select(zt <= off, -infinity, d));
  }
};

// In double anything goes: the base is the side with the larger probability.
template <class K>
struct Robust {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V ratio, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, ratio, exp_s, exp_t);
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
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V ratio, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, ratio, exp_s, exp_t);
    const V w = exp(log_term(k, log) - k.log_mixed);
    const double slope = k.shape.alpha / (k.shape.alpha - 1);
    return {V{}, log.p_s - w, slope * (w - log.p_t), log.p_s, log.p_t};
  }
};

// No divergence: its weight is 0, or the row is infinite.
struct Nothing {
  template <class S, class V>
  static KD_FN Class<V> terms(const Scalars<S>& k, V, V, V, V exp_s, V exp_t) {
    return {V{}, V{}, V{}, exp_s * k.inv_sum_s, exp_t * k.inv_sum_t};
  }
};

// What an infinite cross-entropy or forward KL keeps: the student's gradient, p_s - p_t.
struct Difference {
  template <class V>
  static KD_FN Class<V> terms(const Scalars<double>& k, V s, V t, V ratio, V exp_s, V exp_t) {
    const LogProbs<V> log(k, s, t, ratio, exp_s, exp_t);
    return {V{}, log.p_s - log.p_t, V{}, log.p_s, log.p_t};
  }
};
