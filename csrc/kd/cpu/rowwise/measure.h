// SPDX-License-Identifier: Apache-2.0
// The first step of a row: its maxima and sums.

// Maxima of what was measured and of a block of `n`, to which the sums are re-centred.
template <class S>
void add_range(Row<S>& r, int64_t first, int n, const S* s, const S* t) {
  using V = typename VectorOf<S>::V;
  V high_s = all<V>(r.k.max_s), high_t = all<V>(r.k.max_t), low = all<V>(-floor_of<S>);
  sweep<V>(n, [&](int i, auto w) {
    const V zs = read<V>(s + i, w, s[0]), zt = read<V>(t + i, w, t[0]);
    high_s = at_least(zs, high_s), high_t = at_least(zt, high_t);
    low = at_most(zt, at_most(zs, low));
  });
  const double fall_s = ((double)r.k.max_s - largest(high_s)) * r.k.inv_ts;
  const double fall_t = ((double)r.k.max_t - largest(high_t)) * r.k.inv_tt;
  r.k.max_s = largest(high_s), r.k.max_t = largest(high_t);
  r.finite = largest(-low) < -floor_of<S>;
  if (first == 0 || (fall_s == 0 && fall_t == 0)) return;
  const double shift = fall_t - fall_s, scale = __builtin_exp(fall_s);
  r.excess = scale * (r.excess * __builtin_exp(shift) + r.sum_s * __builtin_expm1(shift));
  r.sum_s *= scale, r.sum_t *= __builtin_exp(fall_t);
  r.plain_s *= __builtin_exp(fall_s / r.k.inv_ts);
  r.plain_t *= __builtin_exp(fall_t / r.k.inv_tt);
  r.lowest += (S)shift, r.highest += (S)shift;
}

template <int plain, class S>
void measure_with(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  if (!r.ranged) r.k.max_s = r.k.max_t = floor_of<S>;
  r.lowest = r.highest = 0;
  r.sum_s = r.sum_t = r.excess = r.plain_s = r.plain_t = 0;
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    const S* t = r.teacher.get(first, n);
    if (!r.ranged) add_range(r, first, n, s, t);
    r.k.subtract_first =
        r.k.inv_ts == r.k.inv_tt && __builtin_fabs((double)r.k.max_t - r.k.max_s) <= 1;
    const Scalars<S> k = r.k;
    Sum<V> sum_s, sum_t, excess, plain_s, plain_t;
    V low = all<V>(r.lowest), high = all<V>(r.highest);
    const auto add = [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const V d = log_ratio<__is_same(decltype(w), Finite)>(k, zs, zt);
      const V exp_s = exp_at_rate(zs - k.max_s, k.rate_s);
      const V exp_t = exp_at_rate(zt - k.max_t, k.rate_t);
      low = at_most(d, low), high = at_least(d, high);
      write<V>(r.exp_s + i, w, exp_s), write<V>(r.exp_t + i, w, exp_t);
      write<V>(r.ratio + i, w, d);
      sum_s += exp_s;
      if constexpr (plain >= 1) plain_s += exp_at_rate(zs - k.max_s, exp_rate<S>(1));
      if constexpr (plain >= 2) plain_t += exp_at_rate(zt - k.max_t, exp_rate<S>(1));
      sum_t += exp_t;
      if constexpr (sizeof(S) == 4)
        excess += select(is_small(d), exp_s * expm1_small(d), exp_t - exp_s);
    };
    const auto fold = [&] {
      sum_s.fold(), sum_t.fold(), excess.fold();
      if constexpr (plain >= 1) plain_s.fold();
      if constexpr (plain >= 2) plain_t.fold();
    };
    if (r.finite) sweep<V, Finite>(n, add, fold);
    else sweep<V>(n, add, fold);
    r.sum_s += sum(sum_s), r.sum_t += sum(sum_t), r.excess += sum(excess);
    if constexpr (plain >= 1) r.plain_s += sum(plain_s);
    if constexpr (plain >= 2) r.plain_t += sum(plain_t);
    r.lowest = -largest(-low), r.highest = largest(high);
  });
}

template <class S>
void measure(Row<S>& r, int plain) {
  if (plain == 0) return measure_with<0>(r);
  if (plain == 1) return measure_with<1>(r);
  measure_with<2>(r);
}

// exp(u_s), exp(u_t) and u_t - u_s of a block; those of a row's only block are still there from
// `measure`.
template <class S>
void exponentials(Row<S>& r, int n, const S* s, const S* t) {
  if (r.classes <= block) return;
  using V = typename VectorOf<S>::V;
  const Scalars<S> k = r.k;
  sweep<V>(n, [&](int i, auto w) {
    const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
    write<V>(r.exp_s + i, w, exp_at_rate(zs - k.max_s, k.rate_s));
    write<V>(r.exp_t + i, w, exp_at_rate(zt - k.max_t, k.rate_t));
    write<V>(r.ratio + i, w, log_ratio(k, zs, zt));
  });
}

// The terms of a vector of classes, whose exponentials there are.
template <class C, class V, class S, class W>
KD_FN Class<V> terms_of(const Row<S>& r, const Scalars<S>& k, int i, W w, V zs, V zt) {
  return C::terms(k, zs, zt, read<V>(r.ratio + i, w, S(0)), read<V>(r.exp_s + i, w, S(0)),
                  read<V>(r.exp_t + i, w, S(0)));
}
