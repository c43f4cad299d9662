// SPDX-License-Identifier: Apache-2.0
// A row of the rowwise family while it is being worked on, and its first step, `measure`.

template <class S> constexpr S floor_of = S(-1e30);  // -inf as a number: its exp is 0
constexpr float exact_range = 60;
constexpr double beyond = 1e300;  // a sum that has overflowed, or would

template <class S>
struct Row {
  const RowwiseParams& p;
  int64_t index;
  RowReader<S> student, teacher;
  S inv_ts, inv_tt;  // 1 / temperature
  Shape<S> shape;
  // measured
  S max_s, max_t, lowest, highest;  // the latter two of u_t - u_s
  bool subtract_first;              // see log_ratio
  double sum_s, sum_t, excess;      // S; sum exp(u_t), in double only; A
  // normalisers
  S delta, inv_sum_s, inv_sum_t, log_sum_s, log_sum_t;
  double log_mixed;  // RenyiFar only: log sum p_t^alpha p_s^(1 - alpha)
  // reduced: f, p_s df/dp_s, p_t df/dp_t
  double value = 0, centre_s = 0, centre_t = 0;
  // emitted: sums of du (z - max), for the temperatures
  double slope_s = 0, slope_t = 0;

  Row(const RowwiseParams& p, int64_t i)
      : p(p), index(i), student{p.student, row_offset(p.student, i)},
        teacher{p.teacher, row_offset(p.teacher, i)}, inv_ts(S(1 / get(p.temperature, i))),
        inv_tt(S(1 / get(p.teacher_temperature, i))), shape{S(p.alpha), S(p.beta)} {}
};

struct Whole {};
struct Part { int n; };
template <class V, class Body>
KD_FN void sweep(int n, const Body& body) {
  int i = 0;
  for (; i + Lanes<V>::count <= n; i += Lanes<V>::count) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}
template <class Body>
KD_FN void for_blocks(int64_t classes, const Body& body) {
  for (int64_t first = 0; first < classes; first += block)
    body(first, classes - first < block ? (int)(classes - first) : block);
}

template <class V, class S>
KD_FN V read(const S* p, Whole, S) { return load<V>(p); }
template <class V, class S>
KD_FN V read(const S* p, Part part, S fill) { return load(p, part.n, fill); }
template <class V, class S>
KD_FN void write(S* p, Whole, V v) { store(p, v); }
template <class V, class S>
KD_FN void write(S* p, Part part, V v) { store(p, part.n, v); }
template <class V, class S, class W>
KD_FN V read_logits(const S* p, W w) {
  return at_least(read<V>(p, w, floor_of<S>), all<V>(floor_of<S>));
}

// u_t - u_s; 0 for a class that is off on both sides. Rows with close maxima and one temperature
// are subtracted first: exact where the logits are close. With an offset between them that would
// round to the offset's precision, so each is then centred first.
template <class V, class S>
KD_FN V log_ratio(const Row<S>& r, V s, V t) {
  const V d = r.subtract_first
                  ? ((t - s) - (r.max_t - r.max_s)) * r.inv_ts
                  : (t - r.max_t) * r.inv_tt - (s - r.max_s) * r.inv_ts;
  return select(s + t <= all<V>(2 * floor_of<S>), V{}, d);
}

template <class S>
void measure(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  r.max_s = r.max_t = floor_of<S>;
  r.lowest = r.highest = 0;
  r.sum_s = r.sum_t = r.excess = 0;
  alignas(64) S buffer_s[block], buffer_t[block];
  for_blocks(r.p.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n, buffer_s);
    const S* t = r.teacher.get(first, n, buffer_t);
    V high_s = all<V>(r.max_s), high_t = all<V>(r.max_t);
    sweep<V>(n, [&](int i, auto w) {
      high_s = at_least(read_logits<V>(s + i, w), high_s);
      high_t = at_least(read_logits<V>(t + i, w), high_t);
    });
    const double fall_s = ((double)r.max_s - largest(high_s)) * r.inv_ts;
    const double fall_t = ((double)r.max_t - largest(high_t)) * r.inv_tt;
    r.max_s = largest(high_s), r.max_t = largest(high_t);
    r.subtract_first =
        r.inv_ts == r.inv_tt && __builtin_fabs((double)r.max_t - r.max_s) <= 1;
    if (first > 0 && (fall_s != 0 || fall_t != 0)) {
      const double shift = fall_t - fall_s, scale = __builtin_exp(fall_s);
      r.excess = scale * (r.excess * __builtin_exp(shift) + r.sum_s * __builtin_expm1(shift));
      r.sum_s *= scale, r.sum_t *= __builtin_exp(fall_t);
      r.lowest += (S)shift, r.highest += (S)shift;
    }
    V sum_s{}, sum_t{}, excess{}, low = all<V>(r.lowest), high = all<V>(r.highest);
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const V d = log_ratio(r, zs, zt), exp_s = exp((zs - r.max_s) * r.inv_ts);
      low = at_most(d, low), high = at_least(d, high);
      sum_s += exp_s;
      if constexpr (sizeof(S) == 8) sum_t += exp((zt - r.max_t) * r.inv_tt);
      else excess += select(is_near(d), exp_s * (d + d * d * expm1_tail(d)),
                            exp((zt - r.max_t) * r.inv_tt) - exp_s);
    });
    r.sum_s += sum(sum_s), r.sum_t += sum(sum_t), r.excess += sum(excess);
    r.lowest = -largest(-low), r.highest = largest(high);
  });
}
