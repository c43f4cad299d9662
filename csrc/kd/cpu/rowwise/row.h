// SPDX-License-Identifier: Apache-2.0
// A row of the rowwise family while it is being worked on, and its first step, `measure`.

constexpr float exact_range = 60;

// What the sweeps read of a row; they take a copy, which no store can alias.
template <class S>
struct Scalars {
  S inv_ts, inv_tt, rate_s, rate_t;  // 1 / temperature, and as exp_at_rate takes it
  S max_s, max_t;
  bool subtract_first;  // see log_ratio
  S delta, inv_sum_s, inv_sum_t, log_sum_s, log_sum_t;
  S log_mixed;  // RenyiFar only: log sum p_t^alpha p_s^(1 - alpha)
  Shape<S> shape;
};

template <class S>
struct Row {
  const RowwiseParams& p;
  int64_t index;
  RowReader<S> student, teacher;
  Scalars<S> k;
  // measured
  S lowest, highest;            // of u_t - u_s
  double sum_s, sum_t, excess;  // S; sum exp(u_t); A
  double sum_plain;             // sum exp(z_s - max), for the cross-entropy if it is wanted
  alignas(64) S exp_s[block], exp_t[block];  // exp(u_s) and exp(u_t) of one block
  // reduced: f, p_s df/dp_s, p_t df/dp_t
  double value = 0, centre_s = 0, centre_t = 0;
  // emitted: sums of du (z - max), for the temperatures
  double slope_s = 0, slope_t = 0;

  Row(const RowwiseParams& p, int64_t i)
      : p(p), index(i), student{p.student, row_offset(p.student, i)},
        // Without its weight the divergence is not looked at, whatever the teacher holds.
        teacher{p.kd_weight != 0 ? RowReader<S>{p.teacher, row_offset(p.teacher, i)} : student} {
    const double inv_ts = 1 / get(p.tau_s, i), inv_tt = 1 / get(p.tau_t, i);
    k.inv_ts = S(inv_ts), k.inv_tt = S(inv_tt);
    k.rate_s = exp_rate<S>(inv_ts), k.rate_t = exp_rate<S>(inv_tt);
    k.shape = {S(p.alpha), S(p.beta)};
  }
};

// u_t - u_s; near 0 for a class that is off on both sides. Rows with close maxima and one
// temperature are subtracted first: exact where the logits are close. With an offset between them
// that would round to the offset's precision, so each is then centred first.
template <class V, class S>
KD_FN V log_ratio(const Scalars<S>& k, V s, V t) {
  if (k.subtract_first) return ((t - s) - (k.max_t - k.max_s)) * k.inv_ts;
  const V d = (t - k.max_t) * k.inv_tt - (s - k.max_s) * k.inv_ts;
  return select(s + t <= all<V>(2 * floor_of<S>), V{}, d);
}

// `plain`: the cross-entropy's normaliser too.
template <bool plain, class S>
void measure(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  r.k.max_s = r.k.max_t = floor_of<S>;
  r.lowest = r.highest = 0;
  r.sum_s = r.sum_t = r.excess = r.sum_plain = 0;
  alignas(64) S buffer_s[block], buffer_t[block];
  for_blocks(r.p.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n, buffer_s);
    const S* t = r.teacher.get(first, n, buffer_t);
    V high_s = all<V>(r.k.max_s), high_t = all<V>(r.k.max_t);
    sweep<V>(n, [&](int i, auto w) {
      high_s = at_least(read<V>(s + i, w, floor_of<S>), high_s);
      high_t = at_least(read<V>(t + i, w, floor_of<S>), high_t);
    });
    const double fall_s = ((double)r.k.max_s - largest(high_s)) * r.k.inv_ts;
    const double fall_t = ((double)r.k.max_t - largest(high_t)) * r.k.inv_tt;
    r.k.max_s = largest(high_s), r.k.max_t = largest(high_t);
    r.k.subtract_first =
        r.k.inv_ts == r.k.inv_tt && __builtin_fabs((double)r.k.max_t - r.k.max_s) <= 1;
    if (first > 0 && (fall_s != 0 || fall_t != 0)) {
      const double shift = fall_t - fall_s, scale = __builtin_exp(fall_s);
      r.excess = scale * (r.excess * __builtin_exp(shift) + r.sum_s * __builtin_expm1(shift));
      r.sum_s *= scale, r.sum_t *= __builtin_exp(fall_t);
      r.sum_plain *= __builtin_exp(fall_s / r.k.inv_ts);
      r.lowest += (S)shift, r.highest += (S)shift;
    }
    const Scalars<S> k = r.k;
    V sum_s{}, sum_t{}, excess{}, sum_plain{}, low = all<V>(r.lowest), high = all<V>(r.highest);
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const V d = log_ratio(k, zs, zt);
      const V exp_s = exp_at_rate(zs - k.max_s, k.rate_s);
      const V exp_t = exp_at_rate(zt - k.max_t, k.rate_t);
      low = at_most(d, low), high = at_least(d, high);
      write<V>(r.exp_s + i, w, exp_s), write<V>(r.exp_t + i, w, exp_t);
      sum_s += exp_s;
      if constexpr (plain) sum_plain += exp_at_rate(zs - k.max_s, exp_rate<S>(1));
      sum_t += exp_t;
      if constexpr (sizeof(S) == 4)
        excess +=
            select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
    });
    r.sum_s += sum(sum_s), r.sum_t += sum(sum_t), r.excess += sum(excess);
    if constexpr (plain) r.sum_plain += sum(sum_plain);
    r.lowest = -largest(-low), r.highest = largest(high);
  });
}

// exp(u_s) and exp(u_t) of a block; those of a row's only block are still there from `measure`.
template <class S>
void exponentials(Row<S>& r, int n, const S* s, const S* t) {
  if (r.p.classes <= block) return;
  using V = typename VectorOf<S>::V;
  const Scalars<S> k = r.k;
  sweep<V>(n, [&](int i, auto w) {
    write<V>(r.exp_s + i, w, exp_at_rate(read_logits<V>(s + i, w) - k.max_s, k.rate_s));
    write<V>(r.exp_t + i, w, exp_at_rate(read_logits<V>(t + i, w) - k.max_t, k.rate_t));
  });
}
