// SPDX-License-Identifier: Apache-2.0
// The third step: the k + 1 probabilities of either side, their divergence and its derivatives, in
// double.

KD_FN double largest_of(const double* x, int n) {
  double high = -infinity;
  for (int i = 0; i < n; i++) high = x[i] > high ? x[i] : high;
  return high;
}
// log sum exp(x / tau); -inf of nothing.
KD_FN double log_sum_exp(const double* x, int n, double tau) {
  const double high = largest_of(x, n), inverse = 1 / tau;
  if (!(high > -infinity)) return high;
  vd total{};
  sweep<vd>(n, [&](int i, auto w) {
    total += exp((read<vd>(x + i, w, -infinity) - high) * inverse);
  });
  return high * inverse + __builtin_log(sum(total));
}
KD_FN double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high > -infinity ? high + __builtin_log1p(__builtin_exp(low - high)) : high;
}

// The student's log-probabilities; false where it has none.
template <class S>
bool student_side(Row<S>& r) {
  Scratch<S>& w = r.w;
  for (int i = 0; i < r.n; i++) {
    S z;
    w.z[i] = *r.student.get(w.id[i], 1, &z);
  }
  const bool tail = r.top > floor_of<S>;
  const double inside = log_sum_exp(w.z, r.n, r.tau_s);
  const double outside = tail ? r.top / r.tau_s + __builtin_log(r.sum) : -infinity;
  const double total = log_add(inside, outside);
  for (int i = 0; i < r.n; i++) w.log_s[i] = w.z[i] / r.tau_s - total;
  w.log_s[r.n] = outside - total;
  return total > -infinity && total < infinity && r.sum < beyond;
}

// The teacher's log-probabilities; false where it has none.
template <class S>
bool teacher_side(Row<S>& r) {
  const TopKParams& p = r.p;
  Scratch<S>& w = r.w;
  const int64_t others = p.classes - r.n;
  const double inside = log_sum_exp(w.v, r.n, r.tau_t);
  double tail = -infinity, total = inside;
  if (p.missing == Missing::tail && others > 0) {
    const bool known = p.logsumexp.data;
    if (known) r.whole = get(p.logsumexp, r.index);
    if (!(r.whole < infinity)) return false;
    const double captured =
        known ? inside - r.whole : r.tau_t == 1 ? inside : log_sum_exp(w.v, r.n, 1);
    if (captured < 0) {
      r.log_tail = __builtin_log(-__builtin_expm1(captured));
      const double width = p.spread ? __builtin_log((double)others) : 0;
      tail = known ? r.whole + r.log_tail : width + (r.log_tail - width) / r.tau_t;
    } else if (p.kind == Kind::reverse_kl) {
      tail = inside + __builtin_log(least_tail);
    }
    total = log_add(inside, tail);
  }
  for (int i = 0; i < r.n; i++) w.log_t[i] = w.v[i] / r.tau_t - total;
  w.log_t[r.n] = tail - total;
  return total > -infinity && total < infinity;
}

// What both sides' terms sum to.
struct Sums {
  double value, to_s, to_t, mass_s, mass_t;
};

// The base is the side with the larger probability, as in the rowwise family's double path.
template <class K, class S>
Sums compare(Row<S>& r, Shape<double> shape) {
  const Scratch<S>& w = r.w;
  vd value{}, own_s{}, own_t{}, mass_s{}, mass_t{};
  sweep<vd>(r.terms, [&](int i, auto part) {
    const vd zero{}, s = read<vd>(w.log_s + i, part, -infinity);
    const vd t = read<vd>(w.log_t + i, part, -infinity);
    const vd p_s = exp(s), p_t = exp(t);
    const vd difference = select(s == t, zero, t - s);  // -inf on both sides, past the end
    const auto student = difference <= zero;
    const vd d = select(student, difference, -difference);
    const vd p = select(student, p_s, p_t), q = select(student, p_t, p_s);
    const auto near = is_near(d);
    const Exp<vd> e = exp_parts(d);
    const Sides<vd, decltype(near)> sides{
        p, q, select(near, p * e.minus_one, q - p), d, at_least(d, all<vd>(Lanes<vd>::lowest_exp)),
        e.minus_one, p * e.excess, select(student, s, t), near};
    const Terms<vd> f = K::terms(sides, shape), g = K::Swapped::terms(sides, K::swap(shape));
    const auto live = p > zero;  // else it contributes nothing, whatever its ratio
    const vd to_s = select(live, select(student, f.base, g.other), zero);
    const vd to_t = select(live, select(student, f.other, g.base), zero);
    value += select(live, select(student, f.value, g.value), zero);
    own_s += to_s, own_t += to_t, mass_s += p_s, mass_t += p_t;
    write<vd>(w.to_s + i, part, to_s), write<vd>(w.to_t + i, part, to_t);
    write<vd>(w.p_s + i, part, p_s), write<vd>(w.p_t + i, part, p_t);
  });
  return {sum(value), sum(own_s), sum(own_t), sum(mass_s), sum(mass_t)};
}

template <class S>
Sums compare_kind(Row<S>& r) {
  const Shape<double> shape{0, r.p.beta};
  switch (r.p.kind) {
    case Kind::reverse_kl: return compare<ReverseKL>(r, shape);
    case Kind::js: return compare<JS>(r, shape);
    case Kind::tv: return compare<TV>(r, shape);
    default: return compare<ForwardKL>(r, shape);
  }
}

// The value, and both gradients per du of the k + 1 classes.
template <class S>
void differentiate(Row<S>& r) {
  const Scratch<S>& w = r.w;
  // A class that is off on both sides is no class.
  r.terms = r.n + (w.log_s[r.n] > -infinity || w.log_t[r.n] > -infinity);
  const Sums sums = compare_kind(r);
  const bool infinite = sums.value > beyond;
  r.value = infinite ? infinity : sums.value;
  const double centre_s = sums.to_s / sums.mass_s, centre_t = sums.to_t / sums.mass_t;
  for (int i = 0; i < r.terms; i++) {
    // Only forward KL has an infinite value, and it keeps the student's gradient.
    w.to_s[i] = infinite ? w.p_s[i] - w.p_t[i] : w.to_s[i] - w.p_s[i] * centre_s;
    w.to_t[i] = infinite ? 0 : w.to_t[i] - w.p_t[i] * centre_t;
  }
  if (!r.has_tail()) w.to_s[r.n] = w.to_t[r.n] = 0;
}

// The teacher's gradients, from those per du: to the values, over tau_t; to what tau_t divides; to
// logsumexp. `log_tail` is a function of the values too.
struct TeacherSlopes {
  double tau = 0, logsumexp = 0;
};
template <class S>
TeacherSlopes chain_teacher(Row<S>& r) {
  const TopKParams& p = r.p;
  const Scratch<S>& w = r.w;
  const bool known = p.logsumexp.data, tail = r.log_tail > -infinity && r.has_tail();
  const double to_tail = tail ? w.to_t[r.n] : 0;
  TeacherSlopes out;
  if (tail && known) out.logsumexp = to_tail / __builtin_exp(r.log_tail);
  if (tail && !known) {
    const double width = p.spread ? __builtin_log((double)(p.classes - r.n)) : 0;
    out.tau = to_tail * (r.log_tail - width);
  }
  for (int i = 0; i < r.n; i++) {
    const double u = known ? w.v[i] / r.tau_t - r.whole : w.v[i];
    const double through = tail ? to_tail * __builtin_exp(u - r.log_tail) : 0;
    out.tau += (known ? w.to_t[i] - through : w.to_t[i]) * w.v[i];
    w.to_t[i] = (w.to_t[i] - through) / r.tau_t;
  }
  return out;
}

// What the student's temperature divides: du z, about the largest.
template <class S>
double student_slope(const Row<S>& r) {
  const Scratch<S>& w = r.w;
  const bool tail = r.has_tail() && r.top > floor_of<S>;
  double high = largest_of(w.z, r.n), total = 0;
  if (tail && r.top > high) high = r.top;
  if (tail) total = w.to_s[r.n] * (r.top - high + r.slope / r.sum);
  for (int i = 0; i < r.n; i++)
    if (w.z[i] > -infinity) total += w.to_s[i] * (w.z[i] - high);
  return total;
}
