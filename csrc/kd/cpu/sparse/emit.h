// SPDX-License-Identifier: Apache-2.0
// The last step: the gradients of a row.

template <class S, class T>
void put(const RowWriter<S>& to, int64_t at, T x) {
  S value = S(x);
  if (to.direct) *to.at(at, nullptr) = value;
  else to.flush(at, 1, &value);
}

// The student's. `times`: of du.
template <class S>
void emit_student(const Row<S>& r, double times) {
  using V = typename VectorOf<S>::V;
  const RowWriter<S>& to = r.to_student;
  if (!to.wanted()) return;
  if (r.p.missing == Missing::renormalize) {
    to.zero(r.p.classes);
  } else {
    const double each = r.student_has_tail() ? r.w.to_s[r.n] * times / r.sum : 0;
    for_blocks(r.p.classes, [&](int64_t first, int n) {
      const double fall = (double)r.w.top[first / block] - r.top;
      const S factor = S(fall == 0 ? each : each * __builtin_exp(fall / r.tau_s));
      S* out = r.kept + first;
      sweep<V>(n, [&](int i, auto w) { write<V>(out + i, w, read<V>(out + i, w, S(0)) * factor); });
      to.flush(first, n, out);
    });
  }
  for (int i = 0; i < r.n; i++) put(to, r.w.id[i], r.w.to_s[i] * times);
}

template <class S>
void emit_values(const Row<S>& r, double times) {
  const RowWriter<double> to(r.p.grad_values, r.index, false);
  if (!to.wanted()) return;
  to.zero(r.p.k);
  for (int i = 0; i < r.n; i++) put(to, r.w.slot[i], r.w.to_t[i] * times);
}

// A power of two for the row's fp16 gradients: half_boost, or less where one would overflow.
template <class S>
double half_boost_of(const Row<S>& r, double times_s, double times_t) {
  double largest = 0, boost = half_boost;
  for (int i = 0; i <= r.n; i++) {
    const double s = __builtin_fabs(r.w.to_s[i] * times_s);
    const double t = i < r.n ? __builtin_fabs(r.w.to_t[i] * times_t) : 0;
    if (s > largest) largest = s;
    if (t > largest) largest = t;
  }
  while (boost * largest > 32768 && boost > 1e-30) boost /= 2;
  return boost;
}
