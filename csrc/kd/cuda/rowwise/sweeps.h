// SPDX-License-Identifier: Apache-2.0
// The sweeps over a row's classes, each by all threads of its group.

// Of a chunk's classes. Two loops, so that the way is chosen once and not both are gone.
template <class S>
KD_DEVICE void log_ratios(Scalars<S> k, const Chunk<S>& c, S (&d)[width<S>]) {
  if (k.subtract_first) {
    for (int j = 0; j < width<S>; j++) d[j] = log_ratio(k, c.s[j], c.t[j]);
  } else {
    for (int j = 0; j < width<S>; j++) d[j] = log_ratio(k, c.s[j], c.t[j]);
  }
}

// The terms of a chunk's classes.
template <class C, class S>
KD_DEVICE void terms_of(const Scalars<S>& k, const Chunk<S>& c, Class<S> (&terms)[width<S>]) {
  S d[width<S>];
  log_ratios(k, c, d);
  for (int j = 0; j < width<S>; j++) {
    const S exp_s = exp_at_rate(c.s[j] - k.max_s, k.rate_s);
    const S exp_t = exp_at_rate(c.t[j] - k.max_t, k.rate_t);
    terms[j] = C::terms(k, c.s[j], c.t[j], d[j], exp_s, exp_t);
  }
}

// The sums of some classes, about numbers that are their maxima or little less: that those move is
// rare, and what has been summed moves with them.
template <class S>
struct Sums {
  Scalars<S> k;
  S slack_s, slack_t;
  S sum_s = 0, sum_t = 0, excess = 0, plain_s = 0, plain_t = 0;
  S low = -floor_of<S>, high = floor_of<S>;  // of u_t - u_s

  KD_DEVICE explicit Sums(const Scalars<S>& scalars)
      : k(scalars), slack_s(8 / at_least(k.inv_ts, S(1))), slack_t(8 / at_least(k.inv_tt, S(1))) {
    k.max_s = k.max_t = floor_of<S>, k.subtract_first = k.inv_ts == k.inv_tt;
  }

  KD_DEVICE void move(S max_s, S max_t) {
    const S fall_s = k.max_s, fall_t = k.max_t;
    k.max_s = max_s, k.max_t = max_t;
    k.subtract_first = k.inv_ts == k.inv_tt && magnitude(max_t - max_s) <= 1;
    const S d = log_ratio(k, fall_s, fall_t);
    const S by_s = exp_at_rate(fall_s - max_s, k.rate_s), by_t = exp_at_rate(fall_t - max_t, k.rate_t);
    sum_s *= by_s, sum_t *= by_t;
    if constexpr (sizeof(S) == 4)  // sums that move apart are not close, and may be subtracted
      excess = select(is_near(d), by_t * excess + sum_s * (d + d * d * expm1_tail(d)), sum_t - sum_s);
    plain_s *= exp_at_rate(fall_s - max_s, exp_rate<S>(1));
    plain_t *= exp_at_rate(fall_t - max_t, exp_rate<S>(1));
    low += d, high += d;
  }

  KD_DEVICE void add(const Chunk<S>& c, int plain) {
    S high_s = c.s[0], high_t = c.t[0];
    for (int j = 1; j < width<S>; j++) high_s = larger(high_s, c.s[j]), high_t = larger(high_t, c.t[j]);
    if (high_s - k.max_s > slack_s || high_t - k.max_t > slack_t)
      move(larger(high_s, k.max_s), larger(high_t, k.max_t));
    S ratios[width<S>];
    log_ratios(k, c, ratios);
    for (int j = 0; j < width<S>; j++) {
      const S d = ratios[j];
      const S exp_s = exp_at_rate(c.s[j] - k.max_s, k.rate_s);
      const S exp_t = exp_at_rate(c.t[j] - k.max_t, k.rate_t);
      low = smaller(low, d), high = larger(high, d);
      sum_s += exp_s, sum_t += exp_t;
      if constexpr (sizeof(S) == 4)
        excess += select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
    }
    if (plain == 0) return;
    for (int j = 0; j < width<S>; j++) {
      plain_s += exp_at_rate(c.s[j] - k.max_s, exp_rate<S>(1));
      if (plain == 2) plain_t += exp_at_rate(c.t[j] - k.max_t, exp_rate<S>(1));
    }
  }
};

template <class S>
KD_DEVICE void measure(Row<S>& r, int plain) {
  Sums<S> own(r.k);
  for_chunks<false>(r, [&](const Chunk<S>& c) { own.add(c, plain); });
  double highest[2] = {own.k.max_s, own.k.max_t};
  r.group.template all_reduce<0, 2>(highest);
  own.move((S)highest[0], (S)highest[1]);
  r.k.max_s = own.k.max_s, r.k.max_t = own.k.max_t, r.k.subtract_first = own.k.subtract_first;
  double sums[7] = {own.sum_s, own.sum_t, own.excess, own.plain_s, own.plain_t, -own.low, own.high};
  r.group.template all_reduce<5, 2>(sums);
  r.sum_s = sums[0], r.sum_t = sums[1], r.excess = sums[2];
  r.plain_s = sums[3], r.plain_t = sums[4];
  r.lowest = (S)-sums[5], r.highest = (S)sums[6];
}

template <class C, class S>
KD_DEVICE void reduce(Row<S>& r) {
  const Scalars<S> k = r.k;
  const S origin_s = r.origin_s(), origin_t = r.origin_t();
  const bool slopes = wants_slopes(r) || r.p.standardize;
  S value = 0, student = 0, teacher = 0, p_s = 0, p_t = 0;
  S slope_s = 0, slope_t = 0, leaning_s = 0, leaning_t = 0;
  for_chunks<false>(r, [&](const Chunk<S>& chunk) {
    Class<S> terms[width<S>];
    terms_of<C>(k, chunk, terms);
    for (int j = 0; j < width<S>; j++) {
      const S s = chunk.s[j], t = chunk.t[j];
      const Class<S>& c = terms[j];
      value += c.value, student += c.student, teacher += c.teacher;
      p_s += c.p_s, p_t += c.p_t;
      if (!slopes) continue;
      const S us = s - origin_s, ut = t - origin_t;
      slope_s += c.student * us, leaning_s += c.p_s * us;
      slope_t += c.teacher * ut, leaning_t += c.p_t * ut;
    }
  });
  double sums[5] = {value, student, teacher, p_s, p_t};
  r.group.template all_reduce<5, 0>(sums);
  // Over the mass as it was rounded, so that a constant in the terms leaves no trace.
  const double per_s = sums[3] > 0 ? 1 / sums[3] : 0, per_t = sums[4] > 0 ? 1 / sums[4] : 0;
  r.value += sums[0];
  r.centre_s = sums[1] * per_s, r.centre_t = sums[2] * per_t;
  if (!slopes) return;
  double tilts[4] = {slope_s, slope_t, leaning_s, leaning_t};
  r.group.template all_reduce<4, 0>(tilts);
  if (r.p.standardize) r.slope_s = tilts[0], r.slope_t = tilts[1];
  r.tilt_s = tilts[2] * per_s, r.tilt_t = tilts[3] * per_t;
}

KD_DEVICE void reduce_renyi_far(Row<double>& r) {
  const Scalars<double> k = r.k;
  const auto log_probs = [&](const Chunk<double>& c) {
    return LogProbs<double>(k, c.s[0], c.t[0], log_ratio(k, c.s[0], c.t[0]),
                            exp_at_rate(c.s[0] - k.max_s, k.rate_s),
                            exp_at_rate(c.t[0] - k.max_t, k.rate_t));
  };
  double most[1] = {floor_of<double>};
  for_chunks<false>(r, [&](const Chunk<double>& c) {
    const double term = RenyiFar::log_term(k, log_probs(c));
    if (term > most[0]) most[0] = term;
  });
  r.group.all_reduce<0, 1>(most);
  double sums[2] = {};  // of the terms; of teacher mass where the student is off
  for_chunks<false>(r, [&](const Chunk<double>& c) {
    const LogProbs<double> log = log_probs(c);
    sums[0] += exp(RenyiFar::log_term(k, log) - most[0]);
    if (c.s[0] <= floor_of<double>) sums[1] += log.p_t;
  });
  r.group.all_reduce<2, 0>(sums);
  const double alpha = k.shape.alpha;
  r.k.log_mixed = most[0] + __builtin_log(sums[0]);
  const bool infinite = most[0] <= floor_of<double> || (alpha > 1 && sums[1] > 0);
  r.value = infinite ? __builtin_inf() : r.k.log_mixed / (alpha - 1);
}

template <class S>
KD_DEVICE void add_moments(Row<S>& r, Moments& s, Moments& t) {
  const S centre_s = S(s.centre), centre_t = S(t.centre);
  S count_s = 0, total_s = 0, squares_s = 0, count_t = 0, total_t = 0, squares_t = 0;
  const auto add = [](S z, S centre, S& count, S& total, S& squares) {
    if (z <= floor_of<S>) return;
    const S distance = z - centre;
    count += 1, total += distance, squares += distance * distance;
  };
  for_chunks<false>(r, [&](const Chunk<S>& c) {
    for (int j = 0; j < width<S>; j++) {
      add(c.s[j], centre_s, count_s, total_s, squares_s);
      add(c.t[j], centre_t, count_t, total_t, squares_t);
    }
  });
  double sums[6] = {count_s, total_s, squares_s, count_t, total_t, squares_t};
  r.group.template all_reduce<6, 0>(sums);
  s.count += sums[0], s.total += sums[1], s.squares += sums[2];
  t.count += sums[3], t.total += sums[4], t.squares += sums[5];
}
