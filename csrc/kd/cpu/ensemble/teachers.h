// SPDX-License-Identifier: Apache-2.0
// A row's teachers while it is being worked on, and the first step, `measure`.

template <class S>
struct Teacher {
  const EnsembleTeacher* p;
  S* exps;                           // exp(u_t) of one block
  double weight;
  Scalars<S> k;
  S lowest, highest;                 // of u_t - u_s
  double sum, excess;                // of exp(u_t); of exp(u_s) expm1(u_t - u_s)
  double value;                      // the weight's derivative: KL, or sum (p_m - p_s) log(q / p_s)
  double mass, centre;               // sum p, and sum p D / sum p: D is the derivative to p
  double slope_s, slope_t;           // sums of du (z - max), for the temperatures
  bool infinite;

  const S* get(int64_t row, int64_t first, int n, S* scratch) const {
    return RowReader<S>{p->logits, row_offset(p->logits, row)}.get(first, n, scratch);
  }
};

// The teachers of row `r` that are looked at: how many, the first of `to`.
template <class S>
int64_t gather(const EnsembleParams& p, const Row<S>& r, Teacher<S>* to, S* exps) {
  int64_t count = 0;
  for (int64_t m = 0; m < p.count; m++) {
    const double weight = get(p.teachers[m].weight, r.index);
    if (weight == 0 && !p.weight_grads) continue;
    Teacher<S>& t = to[count];
    t.p = p.teachers + m, t.weight = weight, t.k = r.k;
    t.exps = exps + block * count++;
    t.lowest = t.highest = 0;
    t.sum = t.excess = t.value = t.mass = t.centre = t.slope_s = t.slope_t = 0;
    t.infinite = false;
    t.k.max_t = floor_of<S>;
  }
  return count;
}

// Where maxima move: `fall_s`, the student's old maximum less the new one, in units of u.
template <class S>
void recentre(Teacher<S>& t, double sum_s, double fall_s, double fall_t) {
  const double shift = fall_t - fall_s, scale = __builtin_exp(fall_s);
  t.excess = scale * (t.excess * __builtin_exp(shift) + sum_s * __builtin_expm1(shift));
  t.sum *= __builtin_exp(fall_t);
  t.lowest += (S)shift, t.highest += (S)shift;
}

template <class S>
void measure(Teacher<S>& t, int64_t row, int64_t first, int n, const S* s, const S* exp_s,
             double sum_s, double fall_s) {
  using V = typename VectorOf<S>::V;
  alignas(64) S buffer[block];
  const S* z = t.get(row, first, n, buffer);
  V top = all<V>(t.k.max_t);
  sweep<V>(n, [&](int i, auto w) { top = at_least(read<V>(z + i, w, floor_of<S>), top); });
  const double fall_t = ((double)t.k.max_t - largest(top)) * t.k.inv_tt;
  t.k.max_t = largest(top);
  t.k.subtract_first =
      t.k.inv_ts == t.k.inv_tt && __builtin_fabs((double)t.k.max_t - t.k.max_s) <= 1;
  if (first > 0 && (fall_s != 0 || fall_t != 0)) recentre(t, sum_s, fall_s, fall_t);
  const Scalars<S> k = t.k;
  S* exps = t.exps;
  V sum_t{}, excess{}, low = all<V>(t.lowest), high = all<V>(t.highest);
  sweep<V>(n, [&](int i, auto w) {
    const V zt = read_logits<V>(z + i, w), d = log_ratio(k, read_logits<V>(s + i, w), zt);
    const V exp_t = exp_at_rate(zt - k.max_t, k.rate_t), e = read<V>(exp_s + i, w, S(0));
    low = at_most(d, low), high = at_least(d, high);
    write<V>(exps + i, w, exp_t);
    sum_t += exp_t;
    if constexpr (sizeof(S) == 4)
      excess += select(is_near(d), e * (d + d * d * expm1_tail(d)), exp_t - e);
  });
  t.sum += sum(sum_t), t.excess += sum(excess);
  t.lowest = -largest(-low), t.highest = largest(high);
}

// The row and its teachers; the student's exponentials are formed once. `plain`: the
// cross-entropy's normaliser too.
template <bool plain, class S>
void measure(Row<S>& r, Teacher<S>* teachers, int64_t count) {
  using V = typename VectorOf<S>::V;
  r.k.max_s = floor_of<S>;
  r.sum_s = r.plain_s = 0;
  r.lowest = 0;  // of u_s
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    V top = all<V>(r.k.max_s);
    sweep<V>(n, [&](int i, auto w) { top = at_least(read<V>(s + i, w, floor_of<S>), top); });
    const double fall = first > 0 ? ((double)r.k.max_s - largest(top)) * r.k.inv_ts : 0;
    const double before = r.sum_s;
    r.k.max_s = largest(top);
    if (fall != 0) {
      r.sum_s *= __builtin_exp(fall), r.plain_s *= __builtin_exp(fall / r.k.inv_ts);
      r.lowest += (S)fall;
    }
    const Scalars<S> k = r.k;
    V sum_s{}, sum_plain{}, low = all<V>(r.lowest);
    sweep<V>(n, [&](int i, auto w) {
      const V z = read_logits<V>(s + i, w) - k.max_s, e = exp_at_rate(z, k.rate_s);
      write<V>(r.exp_s + i, w, e);
      sum_s += e;
      if constexpr (plain) sum_plain += exp_at_rate(z, exp_rate<S>(1));
      low = at_most(select(z > all<V>(floor_of<S> / 2), z * k.inv_ts, V{}), low);
    });
    r.sum_s += sum(sum_s), r.lowest = -largest(-low);
    if constexpr (plain) r.plain_s += sum(sum_plain);
    for (int64_t m = 0; m < count; m++) {
      teachers[m].k.max_s = r.k.max_s;
      measure(teachers[m], r.index, first, n, s, r.exp_s, before, fall);
    }
  });
}
