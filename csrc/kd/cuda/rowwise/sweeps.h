// SPDX-License-Identifier: Apache-2.0
// The sweeps over a row's classes, each by all threads of its group.

template <class S>
struct Chunk {
  int64_t first;
  S s[width<S>], t[width<S>];
};

// All chunks of this thread. `last`: of the row's sweeps.
template <bool last, class S, class Body>
KD_DEVICE void for_chunks(const Row<S>& r, const Body& body) {
  const int lead = lead_of(r.student.reader);
  const int64_t chunks = (r.classes + lead + width<S> - 1) / width<S>;
  if constexpr (sizeof(S) == 8) {
    for (int64_t i = r.group.index; i < chunks; i += r.group.count)
      body(Chunk<S>{i, {r.student.get(i)}, {r.teacher.get(i)}});
  } else {
    Slots& slots = r.slots;
    const bool staged = slots.p.slots > 0;
    const int count = staged ? slots.p.slots : 1;
    for (int slot = 0; slot < count; slot++) {
      int64_t begin = 0, end = chunks, from = 0;
      int n = 0;
      if (staged) {
        slots.range(slot, chunks, begin, end);
        from = begin * 4 > lead ? begin * 4 - lead : 0;
        const int64_t to = end * 4 - lead < r.classes ? end * 4 - lead : r.classes;
        n = to > from ? (int)(to - from) : 0;
        slots.wait(slot);
      }
      const Piece s(r.student.reader, from, n), t(r.teacher.reader, from, n);
      const int first = staged ? thread_index() : r.group.index;
      const int step = staged ? block_threads() : r.group.count;
      for (int64_t i = begin + first; i < end; i += step) {
        Chunk<S> c;
        c.first = i * 4 - lead;
        if (staged) {
          read(slots.of(slots.student, slot), s, r.student.reader.rows.dtype, from, c.first, c.s);
          read(slots.of(slots.teacher, slot), t, r.teacher.reader.rows.dtype, from, c.first, c.t);
        } else {
          read(r.student.reader, c.first, r.classes, c.s);
          read(r.teacher.reader, c.first, r.classes, c.t);
        }
        r.student.amend(c.first, c.s), r.teacher.amend(c.first, c.t);
        body(c);
      }
      if (last && staged) slots.refill(slot);
    }
  }
}

template <class S>
KD_DEVICE void measure(Row<S>& r, int plain) {
  S high_s = floor_of<S>, high_t = floor_of<S>;
  for_chunks<false>(r, [&](const Chunk<S>& c) {
    for (int j = 0; j < width<S>; j++) {
      high_s = c.s[j] > high_s ? c.s[j] : high_s;
      high_t = c.t[j] > high_t ? c.t[j] : high_t;
    }
  });
  double highest[2] = {high_s, high_t};
  r.group.template all_reduce<0, 2>(highest);
  r.k.max_s = (S)highest[0], r.k.max_t = (S)highest[1];
  r.k.subtract_first =
      r.k.inv_ts == r.k.inv_tt && __builtin_fabs((double)r.k.max_t - r.k.max_s) <= 1;

  const Scalars<S> k = r.k;
  S sum_s = 0, sum_t = 0, excess = 0, plain_s = 0, plain_t = 0, low = 0, high = 0;
  for_chunks<false>(r, [&](const Chunk<S>& c) {
    for (int j = 0; j < width<S>; j++) {
      const S d = log_ratio(k, c.s[j], c.t[j]);
      const S exp_s = exp_at_rate(c.s[j] - k.max_s, k.rate_s);
      const S exp_t = exp_at_rate(c.t[j] - k.max_t, k.rate_t);
      low = d < low ? d : low, high = d > high ? d : high;
      sum_s += exp_s, sum_t += exp_t;
      if constexpr (sizeof(S) == 4)
        excess += select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
      if (plain == 0) continue;
      plain_s += exp_at_rate(c.s[j] - k.max_s, exp_rate<S>(1));
      if (plain == 2) plain_t += exp_at_rate(c.t[j] - k.max_t, exp_rate<S>(1));
    }
  });
  double sums[7] = {sum_s, sum_t, excess, plain_s, plain_t, -low, high};
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
    for (int j = 0; j < width<S>; j++) {
      const S s = chunk.s[j], t = chunk.t[j];
      const Class<S> c = C::terms(k, s, t, exp_at_rate(s - k.max_s, k.rate_s),
                                  exp_at_rate(t - k.max_t, k.rate_t));
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
    return LogProbs<double>(k, c.s[0], c.t[0], exp_at_rate(c.s[0] - k.max_s, k.rate_s),
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
