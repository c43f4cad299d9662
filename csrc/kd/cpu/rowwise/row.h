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

// One side's logits of the divergence's classes.
template <class S>
struct Side {
  RowReader<S> reader;
  int64_t patched = -1;      // a class that is read as `patch`
  S patch = 0;
  bool one_block = false;
  const S* read = nullptr;   // the row's only block, converted and patched once
  // Where the row is standardised, see standardize.h.
  double mean = 0, std = 0, spread = 0;
  alignas(64) S buffer[block];

  explicit Side(const RowReader<S>& reader) : reader(reader) {}

  const S* get(int64_t first, int n) {
    if (read) return read;
    const S* z = reader.get(first, n, buffer);
    if (patched >= first && patched < first + n) {
      if (z != buffer) __builtin_memcpy(buffer, z, n * sizeof(S));
      buffer[patched - first] = patch;
      z = buffer;
    }
    if (one_block) read = z;
    return z;
  }
  S at(int64_t i) const {
    S z;
    return *reader.get(i, 1, &z);
  }
};

template <class S>
struct Row {
  const RowwiseParams& p;
  int64_t index, classes;  // of the divergence
  int64_t target = -1;     // among them
  Side<S> student, teacher;
  Scalars<S> k;
  // measured
  S lowest, highest;            // of u_t - u_s
  double sum_s, sum_t, excess;  // S; sum exp(u_t); A
  double plain_s, plain_t;      // sum exp(z - max) at temperature 1, where it is wanted
  alignas(64) S exp_s[block], exp_t[block];  // exp(u_s) and exp(u_t) of one block
  // A gradient is du times its factor, where du = share (p df/dp - p centre) - p shift; and the
  // target's own where it is hidden from the sweeps.
  double share = 1, shift_s = 0, shift_t = 0;
  bool infinite = false;     // what the target has of its own is
  double teacher_ratio = 1;  // of the target's logit as it is read
  // reduced: f, p_s df/dp_s, p_t df/dp_t; sums of du (z - max), for temperatures and deviations,
  // and of p (z - max)
  double value = 0, centre_s = 0, centre_t = 0, slope_s = 0, slope_t = 0, tilt_s = 0, tilt_t = 0;

  Row(const RowwiseParams& p, int64_t i)
      : p(p), index(i), classes(p.width ? p.width : p.classes),
        student(RowReader<S>{p.student, row_offset(p.student, i) + p.first * p.student.class_stride}),
        // Without its weight the divergence is not looked at, whatever the teacher holds.
        teacher(p.kd_weight != 0 || p.target_weight != 0
                    ? RowReader<S>{p.teacher, row_offset(p.teacher, i) +
                                                  p.teacher_first * p.teacher.class_stride}
                    : student.reader) {
    student.one_block = teacher.one_block = classes <= block;
    k.shape = {S(p.alpha), S(p.beta)};
    if (p.target != Target::ordinary) target = p.targets[i] - p.first;
  }
  bool target_known() const { return target >= 0 && target < classes; }
  // What slopes are taken about. du sums to 0, so that it matters to the rounding alone.
  S origin_s() const { return p.standardize ? S(student.mean) : k.max_s; }
  S origin_t() const { return p.standardize ? S(teacher.mean) : k.max_t; }
  bool target_hidden() const { return student.patched >= 0; }
  // What a hidden target has in the slopes, about the others' `tilt`.
  void add_target_slopes(double tilt_s, double tilt_t) {
    if (shift_s != 0) slope_s += shift_s * ((double)student.at(target) - origin_s() - tilt_s);
    if (shift_t != 0) slope_t += shift_t * ((double)teacher.at(target) - origin_t() - tilt_t);
  }
  void temper(double tau_s, double tau_t) {
    k.inv_ts = S(1 / tau_s), k.inv_tt = S(1 / tau_t);
    k.rate_s = exp_rate<S>(1 / tau_s), k.rate_t = exp_rate<S>(1 / tau_t);
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

// `plain`: how many of the sums at temperature 1 are wanted, the student's first.
template <int plain, class S>
void measure(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  r.k.max_s = r.k.max_t = floor_of<S>;
  r.lowest = r.highest = 0;
  r.sum_s = r.sum_t = r.excess = r.plain_s = r.plain_t = 0;
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    const S* t = r.teacher.get(first, n);
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
      r.plain_s *= __builtin_exp(fall_s / r.k.inv_ts);
      r.plain_t *= __builtin_exp(fall_t / r.k.inv_tt);
      r.lowest += (S)shift, r.highest += (S)shift;
    }
    const Scalars<S> k = r.k;
    V sum_s{}, sum_t{}, excess{}, plain_s{}, plain_t{}, low = all<V>(r.lowest),
        high = all<V>(r.highest);
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const V d = log_ratio(k, zs, zt);
      const V exp_s = exp_at_rate(zs - k.max_s, k.rate_s);
      const V exp_t = exp_at_rate(zt - k.max_t, k.rate_t);
      low = at_most(d, low), high = at_least(d, high);
      write<V>(r.exp_s + i, w, exp_s), write<V>(r.exp_t + i, w, exp_t);
      sum_s += exp_s;
      if constexpr (plain >= 1) plain_s += exp_at_rate(zs - k.max_s, exp_rate<S>(1));
      if constexpr (plain >= 2) plain_t += exp_at_rate(zt - k.max_t, exp_rate<S>(1));
      sum_t += exp_t;
      if constexpr (sizeof(S) == 4)
        excess +=
            select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
    });
    r.sum_s += sum(sum_s), r.sum_t += sum(sum_t), r.excess += sum(excess);
    if constexpr (plain >= 1) r.plain_s += sum(plain_s);
    if constexpr (plain >= 2) r.plain_t += sum(plain_t);
    r.lowest = -largest(-low), r.highest = largest(high);
  });
}

// exp(u_s) and exp(u_t) of a block; those of a row's only block are still there from `measure`.
template <class S>
void exponentials(Row<S>& r, int n, const S* s, const S* t) {
  if (r.classes <= block) return;
  using V = typename VectorOf<S>::V;
  const Scalars<S> k = r.k;
  sweep<V>(n, [&](int i, auto w) {
    write<V>(r.exp_s + i, w, exp_at_rate(read_logits<V>(s + i, w) - k.max_s, k.rate_s));
    write<V>(r.exp_t + i, w, exp_at_rate(read_logits<V>(t + i, w) - k.max_t, k.rate_t));
  });
}
