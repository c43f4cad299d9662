// SPDX-License-Identifier: Apache-2.0
// A class's terms: of one teacher's divergence, and of the mixture's.

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
  const V inverse = 1.f / at_least(p, all<V>(1e-37)), e = gap * inverse;
  const Log1p<V> l = log_parts(at_least(q * inverse, all<V>(1e-30)), e);
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
