// SPDX-License-Identifier: Apache-2.0
// The sweeps over a row's classes, each by all threads of its group.

// What exp and its sums are taken of: z at a temperature, less about that of a number that is the
// maximum, or somewhat less. It is one instruction, of an exponent of 2 in fp32; since the sums and
// all that is divided by them have the same rounded `bias`, what its rounding takes is made good once
// for all classes.
template <class S>
struct Exponent {
  S rate, about = floor_of<S>;
  S bias = sizeof(S) == 4 ? S(1e38) : S(1e250);  // about nothing yet: every class is too large

  KD_DEVICE explicit Exponent(S rate) : rate(rate) {}
  KD_DEVICE Exponent(S rate, S about) : rate(rate) { move(about); }
  KD_DEVICE S operator()(S z) const { return fused(z, rate, bias); }
  // What that changes; sums about nothing have no class that counts.
  KD_DEVICE S move(S to) {
    if (!(to > floor_of<S>)) return 0;
    const S from = about > floor_of<S> ? bias : -to * rate;
    about = to, bias = -to * rate;
    return bias - from;
  }
  KD_DEVICE S lost() const { return about > floor_of<S> ? -fused(about, rate, bias) : S(0); }
  // By which sums are multiplied that have to be about that very number.
  KD_DEVICE S made_good() const { return exp_parts(lost() * unit<S>).value; }
};

// A row's scalars for the sweeps in fp32.
struct Centred : Scalars<float> {
  Exponent<float> student, teacher;
  float apart, lag;  // of the maxima; of what ratios are taken from, what delta is of centred logits
  bool close;

  KD_DEVICE Centred(const Scalars<float>& k, bool close)
      : Scalars<float>(k), student(rate_s, max_s), teacher(rate_t, max_t), apart(max_t - max_s),
        lag(delta), close(close) {
    if (!subtract_first && !close) lag -= (teacher.lost() - student.lost()) * unit<float>;
    delta = 0;  // the ratios have it
    inv_sum_s *= student.made_good(), inv_sum_t *= teacher.made_good();
  }

  // Exponents, and log(q / p): as log_ratio has it, but from the exponents where sides that are not
  // close need no more. Loops, so that the way is chosen once.
  KD_DEVICE void look(const Chunk<float>& c, float (&s)[4], float (&t)[4], float (&d)[4]) const {
    for (int j = 0; j < 4; j++) s[j] = student(c.s[j]), t[j] = teacher(c.t[j]);
    if (subtract_first) {
      for (int j = 0; j < 4; j++) d[j] = ((c.t[j] - c.s[j]) - apart) * inv_ts - lag;
    } else if (close) {
      for (int j = 0; j < 4; j++)
        d[j] = ((c.t[j] - max_t) * inv_tt - (c.s[j] - max_s) * inv_ts) - lag;
    } else {
      for (int j = 0; j < 4; j++) d[j] = (t[j] - s[j]) * unit<float> - lag;
    }
    // Of a class that is off on both sides it is NaN, which powers need as 0; of one that is off in
    // the teacher alone, which only some divergences have in fp32, -inf.
    for (int j = 0; j < 4; j++)
      d[j] = Divergence::zero_teacher ? larger(d[j], floor_of<float>) : d[j] == d[j] ? d[j] : 0;
  }
};

// The terms of a chunk's classes.
template <class C>
KD_DEVICE void terms_of(const Centred& k, const Chunk<float>& c, Class<float> (&terms)[4]) {
  float s[4], t[4], d[4];
  k.look(c, s, t, d);
  for (int j = 0; j < 4; j++)
    terms[j] = C::terms(k, at_least(c.s[j], floor_of<float>), c.t[j], d[j], exp_of(s[j]), exp_of(t[j]));
}
template <class C>
KD_DEVICE void terms_of(const Scalars<double>& k, const Chunk<double>& c, Class<double> (&terms)[1]) {
  const double exp_s = exp_at_rate(c.s[0] - k.max_s, k.rate_s);
  const double exp_t = exp_at_rate(c.t[0] - k.max_t, k.rate_t);
  terms[0] = C::terms(k, c.s[0], c.t[0], log_ratio(k, c.s[0], c.t[0]), exp_s, exp_t);
}
KD_DEVICE Centred for_sweep(const Row<float>& r) { return Centred(r.k, r.close); }
KD_DEVICE const Scalars<double>& for_sweep(const Row<double>& r) { return r.k; }

// The sums of some classes. That what they are about has to move, since they grow large, is rare, and
// what has been summed moves with it.
template <class S>
struct Sums {
  static constexpr S large = 8192;  // well above one class for each that a thread has
  int plain;    // how many sums are wanted at temperature 1
  bool lowest;  // whether `low` is
  Exponent<S> student, teacher, plain_student, plain_teacher;
  S sum_s = 0, sum_t = 0, distance = 0, plain_s = 0, plain_t = 0;
  S low = -floor_of<S>, high = floor_of<S>;  // of the exponents' differences

  KD_DEVICE Sums(const Row<S>& r, int plain)
      : plain(plain), lowest(sizeof(S) == 8 || !Divergence::zero_teacher || r.p.grad_teacher.data),
        student(r.k.rate_s), teacher(r.k.rate_t), plain_student(exp_rate<S>(1)),
        plain_teacher(exp_rate<S>(1)) {}

  KD_DEVICE void move(S to_s, S to_t) {
    const S by_s = student.move(to_s), by_t = teacher.move(to_t);
    const S times_s = exp_of(by_s), times_t = exp_of(by_t);
    low += by_t - by_s, high += by_t - by_s;
    distance = distance * times_t + sum_s * magnitude(times_t - times_s);
    sum_s *= times_s, sum_t *= times_t;
    plain_s *= exp_of(plain_student.move(to_s)), plain_t *= exp_of(plain_teacher.move(to_t));
  }
  // The sums with a chunk; of all of them.
  KD_DEVICE S take(const Chunk<S>& c) {
    for (int j = 0; j < width<S>; j++) {
      const S s = student(c.s[j]), t = teacher(c.t[j]), exp_s = exp_of(s), exp_t = exp_of(t);
      const bool off = sizeof(S) == 8 && c.s[j] + c.t[j] <= 2 * floor_of<S>;  // in fp32 that is NaN
      const S d = off ? S(0) : t - s;
      sum_s += exp_s, sum_t += exp_t;
      distance += magnitude(exp_t - exp_s);
      high = larger(high, d);
      if (lowest) low = smaller(low, d);
    }
    S all = sum_s + sum_t;
    for (int j = 0; plain > 0 && j < width<S>; j++) plain_s += exp_of(plain_student(c.s[j]));
    for (int j = 0; plain > 1 && j < width<S>; j++) plain_t += exp_of(plain_teacher(c.t[j]));
    if (plain > 0) all += plain_s + plain_t;
    return all;
  }
  KD_DEVICE void add(const Chunk<S>& c) {
    Sums next(*this);
    if (!(next.take(c) < large)) {
      S to_s = student.about, to_t = teacher.about;
      for (int j = 0; j < width<S>; j++) to_s = larger(to_s, c.s[j]), to_t = larger(to_t, c.t[j]);
      move(to_s, to_t);
      next = *this;
      next.take(c);
    }
    *this = next;
  }
};

// sum exp(u_t) - exp(u_s), where the sums are so close that their difference is but their rounding.
KD_DEVICE double compare(const Row<float>& r) {
  Scalars<float> scalars = r.k;
  scalars.delta = 0, scalars.inv_sum_s = scalars.inv_sum_t = 1;
  const Centred k(scalars, true);
  float excess = 0;
  for_chunks<false>(r, [&](const Chunk<float>& c) {
    float s[4], t[4], ratios[4];
    k.look(c, s, t, ratios);
    for (int j = 0; j < 4; j++) {
      const float d = ratios[j], exp_s = exp_of(s[j]) * k.inv_sum_s, exp_t = exp_of(t[j]) * k.inv_sum_t;
      excess += select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
    }
  });
  double sum[1] = {excess};
  r.group.all_reduce<1, 0>(sum);
  return sum[0];
}

template <class S>
KD_DEVICE void measure(Row<S>& r, int plain) {
  Sums<S> own(r, plain);
  for_chunks<false>(r, [&](const Chunk<S>& c) { own.add(c); });
  double highest[2] = {own.student.about, own.teacher.about};
  r.group.template all_reduce<0, 2>(highest);
  own.move((S)highest[0], (S)highest[1]);
  r.k.max_s = own.student.about, r.k.max_t = own.teacher.about;
  r.k.subtract_first = r.k.inv_ts == r.k.inv_tt && magnitude(r.k.max_t - r.k.max_s) <= 1;
  double sums[7] = {own.sum_s, own.sum_t, own.distance, own.plain_s, own.plain_t, -own.low, own.high};
  r.group.template all_reduce<5, 2>(sums);
  // A side without a class that counts has nothing to be divided by.
  r.sum_s = r.k.max_s > floor_of<S> ? sums[0] * own.student.made_good() : 1;
  r.sum_t = r.k.max_t > floor_of<S> ? sums[1] * own.teacher.made_good() : 1;
  r.plain_s = sums[3] * own.plain_student.made_good();
  r.plain_t = sums[4] * own.plain_teacher.made_good();
  r.lowest = (S)-sums[5] * unit<S>, r.highest = (S)sums[6] * unit<S>;
  if constexpr (sizeof(S) == 4) {
    r.close = sums[2] < sums[0] / 4;
    r.excess = r.close ? compare(r) : r.sum_t - r.sum_s;
  }
}

template <class C, class S>
KD_DEVICE void reduce(Row<S>& r) {
  const auto k = for_sweep(r);
  const S origin_s = r.origin_s(), origin_t = r.origin_t();
  const bool slopes = wants_slopes(r) || r.p.standardize;
  S value = 0, student = 0, teacher = 0, p_s = 0, p_t = 0;
  S slope_s = 0, slope_t = 0, leaning_s = 0, leaning_t = 0;
  for_chunks<false>(r, [&](const Chunk<S>& chunk) {
    Class<S> terms[width<S>];
    terms_of<C>(k, chunk, terms);
    for (int j = 0; j < width<S>; j++) {
      const S s = at_least(chunk.s[j], floor_of<S>), t = at_least(chunk.t[j], floor_of<S>);
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
