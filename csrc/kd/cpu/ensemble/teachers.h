// SPDX-License-Identifier: Apache-2.0
// A row's teachers while it is being worked on, and the first step, `measure`.

// Divergences above this are exact from plain sums in fp32, where no more than 1 cancels in them.
constexpr double apart = 1. / 8;

template <class S>
struct Teacher {
  const EnsembleTeacher* p;
  S *exps, *gaps;                    // exp(u_t) of one block, and that less exp(u_s)
  S* buffer;                         // of its logits
  const S* read;                     // those, in the buffer if they have to be converted
  double weight;
  Scalars<S> k;
  S top, highest;                    // of its logits, up to this block; of u_t - u_s
  // Sums of exp(u_t); of the last block, of exp(u_t) (u_t - u_s).
  double sum, dot;
  // In fp32, of those that are compared with the student, with d = u_t - u_s - shift: sums of
  // exp(u_s) expm1(d), and of the last block of exp(u_s) (1 + exp(d) (d - 1)), both exact near 0.
  double excess, bend;
  double shift, scale;               // and its exponential
  double delta, ratio;               // log of the sum over the student's; and from `excess`
  bool far, close;                   // not compared; compared, and `ratio` is exact
  double value;                      // the weight's derivative: KL, or sum (p_m - p_s) log(q / p_s)
  double mass, centre;               // sum p, and sum p D / sum p: D is the derivative to p
  double slope_s, slope_t;           // sums of du (z - max), for the temperatures
  bool infinite;
  const S* kept;                     // what `at_once` takes of the student's gradient
  S share;

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
    t.exps = exps + 3 * block * count++, t.gaps = t.exps + block, t.buffer = t.gaps + block;
    t.highest = 0, t.top = floor_of<S>;
    t.sum = t.dot = t.excess = t.bend = t.value = t.mass = t.centre = t.slope_s = t.slope_t = 0;
    t.shift = 0, t.scale = 1;
    t.far = t.infinite = false;
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
  t.highest += (S)shift;
}

// To prefetch: where `at` is in the row that follows, in another page, which hardware does not
// foresee. Itself where it is a copy.
template <class S>
const S* next_row(const S* at, const S* copy, const Rows& rows) {
  return at == copy ? at : at + rows.inner_stride;
}

// One block, each side's exponentials about its own maximum. `u_s` is bounded from below, so that a
// class that is off on both sides has a low difference.
template <class S>
KD_FN void measure(Teacher<S>& t, int n, const S* z, const S* u_s) {
  using V = typename VectorOf<S>::V;
  V sum_t{}, dot{}, high = all<V>(t.highest);
  const S* next = next_row(z, t.buffer, t.p->logits);
  sweep<V>(n, [&, k = t.k, exps = t.exps](int i, auto w) {
    __builtin_prefetch(next + i, 0, 2);
    const V zt = read_logits<V>(z + i, w) - k.max_t, exp_t = exp_at_rate(zt, k.rate_t);
    const V d = zt * k.inv_tt - read<V>(u_s + i, w, S(0));
    write<V>(exps + i, w, exp_t);
    sum_t += exp_t, dot += exp_t * d, high = at_least(high, d);
  });
  t.sum += sum(sum_t), t.dot = sum(dot), t.highest = largest(high);
}

// Of a row's only block: whether those sums, which cancel, give an exact divergence. If not, the
// sides are compared about their normalisers, where these are known to differ.
inline bool is_far(Teacher<float>& t, double sum_s) {
  t.delta = __builtin_log(t.sum / sum_s);
  const double off = __builtin_fabs(t.delta);
  t.far = t.dot / t.sum - t.delta > apart * (1 + off);
  if (!t.far && off > 1e-5) t.shift = (float)t.delta, t.scale = __builtin_exp(t.shift);
  return t.far;
}

// One block again, of a teacher that may be close: a near class has the student's exponential
// times exp(d). `direct`: logits are subtracted first, see log_ratio.
template <bool mixture, bool direct>
KD_FN void compare(Teacher<float>& t, int n, const float* s, const float* u_s, const float* exp_s) {
  using V = vf;
  V excess{}, bend{};
  sweep<V>(n, [&, k = t.k, z = t.read, exps = t.exps, gaps = t.gaps, off = t.k.max_t - t.k.max_s,
               shift = (float)t.shift, scale = (float)(1 / t.scale)](int i, auto w) {
    const V zt = read_logits<V>(z + i, w);
    const V ratio = direct ? ((zt - read_logits<V>(s + i, w)) - off) * k.inv_ts
                           : (zt - k.max_t) * k.inv_tt - read<V>(u_s + i, w, 0.f);
    const V d = ratio - shift;
    const V e = read<V>(exp_s + i, w, 0.f), exp_t = read<V>(exps + i, w, 0.f) * scale;
    const auto near = is_near(d);
    const V square = e * (d * d * expm1_tail(d)), growth = e * d + square;
    const V gap = select(near, growth, exp_t - e);
    write<V>(gaps + i, w, gap);
    excess += gap;
    if constexpr (mixture) write<V>(exps + i, w, select(near, e + growth, exp_t));
    else bend += select(near, growth, exp_t) * d - select(near, square, gap);
  });
  t.excess += sum(excess), t.bend = sum(bend);
}

// The largest logits of a block, of four rows at a time, since each of these chains waits for itself.
template <class S>
void raise_tops(const S* const (&z)[4], S* const (&top)[4], int n) {
  using V = typename VectorOf<S>::V;
  V high[4];
  for (int j = 0; j < 4; j++) high[j] = all<V>(*top[j]);
  sweep<V>(n, [&](int i, auto w) {
    for (int j = 0; j < 4; j++) high[j] = at_least(read<V>(z[j] + i, w, floor_of<S>), high[j]);
  });
  for (int j = 0; j < 4; j++) *top[j] = largest(high[j]);
}
// Those of the teachers, and the student's.
template <class S>
S raise_tops(const Row<S>& r, const S* s, Teacher<S>* teachers, int64_t count, int n) {
  S top = r.k.max_s;
  for (int64_t m = 0; m == 0 || m < count; m += 3) {
    const S* z[4] = {s, s, s, s};
    S* to[4] = {&top, &top, &top, &top};
    for (int j = 0; j < 3 && m + j < count; j++)
      z[j] = teachers[m + j].read, to[j] = &teachers[m + j].top;
    raise_tops(z, to, n);
  }
  return top;
}

// To the new maxima; `fall_s` as above.
template <class S>
void raise(Teacher<S>& t, const Row<S>& r, bool first, double sum_s, double fall_s) {
  const double fall_t = ((double)t.k.max_t - t.top) * t.k.inv_tt;
  t.k.max_t = t.top, t.k.max_s = r.k.max_s;
  t.k.subtract_first =
      t.k.inv_ts == t.k.inv_tt && __builtin_fabs((double)t.k.max_t - t.k.max_s) <= 1;
  if (!first && (fall_s != 0 || fall_t != 0)) recentre(t, sum_s, fall_s, fall_t);
}

// The row and its teachers; the student's exponentials are formed once.
template <bool mixture, class S>
void measure(Row<S>& r, Teacher<S>* teachers, int64_t count) {
  using V = typename VectorOf<S>::V;
  const bool plain = r.p.ce_weight != 0;  // the cross-entropy's normaliser too
  r.k.max_s = floor_of<S>;
  r.sum_s = r.plain_s = 0;
  r.lowest = 0;  // of u_s
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    for (int64_t m = 0; m < count; m++)
      teachers[m].read = teachers[m].get(r.index, first, n, teachers[m].buffer);
    const S top = raise_tops(r, s, teachers, count, n);
    const double fall = first > 0 ? ((double)r.k.max_s - top) * r.k.inv_ts : 0;
    const double before = r.sum_s;
    r.k.max_s = top;
    if (fall != 0) {
      r.sum_s *= __builtin_exp(fall), r.plain_s *= __builtin_exp(fall / r.k.inv_ts);
      r.lowest += (S)fall;
    }
    const Scalars<S> k = r.k;
    V sum_s{}, sum_plain{}, low = all<V>(r.lowest);
    const S* next = next_row(s, r.student.buffer, r.p.student);
    const S lowest = floor_of<S> / 2 * k.inv_tt;
    sweep<V>(n, [&](int i, auto w) {
      __builtin_prefetch(next + i, 0, 2);
      const V z = read_logits<V>(s + i, w) - k.max_s, e = exp_at_rate(z, k.rate_s);
      write<V>(r.exp_s + i, w, e);
      write<V>(r.exp_t + i, w, at_least(z * k.inv_ts, all<V>(lowest)));
      sum_s += e;
      if (plain) sum_plain += exp_at_rate(z, exp_rate<S>(1));
      if constexpr (mixture)
        low = at_most(select(z > all<V>(floor_of<S> / 2), z * k.inv_ts, V{}), low);
    });
    r.sum_s += sum(sum_s), r.lowest = -largest(-low);
    if (plain) r.plain_s += sum(sum_plain);
    for (int64_t m = 0; m < count; m++) {
      raise(teachers[m], r, first == 0, before, fall);
      measure(teachers[m], n, teachers[m].read, r.exp_t);
    }
    if constexpr (sizeof(S) == 4)
      for (int64_t m = 0; m < count; m++) {
        Teacher<S>& t = teachers[m];
        if (!mixture && r.classes <= block && is_far(t, r.sum_s)) continue;
        t.k.subtract_first ? compare<mixture, true>(t, n, s, r.exp_t, r.exp_s)
                           : compare<mixture, false>(t, n, s, r.exp_t, r.exp_s);
      }
  });
}

template <class S>
bool is_sound(const Row<S>& r) {
  return r.sum_s < beyond && r.k.max_s > floor_of<S>;
}
template <class S>
bool is_sound(const Teacher<S>& t) {
  return t.sum < beyond && t.k.max_t > floor_of<S>;
}

inline void normalise(const Row<float>& r, Teacher<float>& t) {
  // A is exact where the normalisers are close, and cancels where the teacher's is much smaller.
  t.ratio = t.excess / r.sum_s;
  t.close = !t.far && __builtin_fabs(t.ratio) < 0.5;
  if (t.close) t.delta = t.shift + __builtin_log1p(t.ratio);
  else if (!t.far) t.delta = __builtin_log(t.sum / r.sum_s);
  t.k.delta = (float)t.delta;
  t.k.inv_sum_t = (float)(1 / (t.close ? (r.sum_s + t.excess) * t.scale : t.sum));
}
inline void normalise(const Row<double>& r, Teacher<double>& t) {
  t.k.inv_sum_t = 1 / t.sum;
  t.k.delta = __builtin_log(t.sum) - __builtin_log(r.sum_s);
}
