// SPDX-License-Identifier: Apache-2.0
// The second step: the loss of a row, and the sums that centre its gradients.

template <class C, class S>
void reduce(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  const bool slopes = r.p.row_grads || r.p.standardize;
  double mass_s = 0, mass_t = 0, tilt_s = 0, tilt_t = 0;
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    const S* t = r.teacher.get(first, n);
    const Scalars<S> k = r.k;
    const S origin_s = r.origin_s(), origin_t = r.origin_t();
    exponentials(r, n, s, t);
    Sum<V> value, student, teacher, p_s, p_t;
    V slope_s{}, slope_t{}, leaning_s{}, leaning_t{};
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const Class<V> c = terms_of<C>(r, k, i, w, zs, zt);
      value += c.value, student += c.student, teacher += c.teacher;
      p_s += c.p_s, p_t += c.p_t;
      if (slopes) {
        const V us = zs - origin_s, ut = zt - origin_t;
        slope_s += c.student * us, leaning_s += c.p_s * us;
        slope_t += c.teacher * ut, leaning_t += c.p_t * ut;
      }
    }, [&] { value.fold(), student.fold(), teacher.fold(), p_s.fold(), p_t.fold(); });
    r.value += sum(value), r.centre_s += sum(student), r.centre_t += sum(teacher);
    mass_s += sum(p_s), mass_t += sum(p_t);
    if (r.p.standardize) r.slope_s += sum(slope_s), r.slope_t += sum(slope_t);
    tilt_s += sum(leaning_s), tilt_t += sum(leaning_t);
  });
  // Over the mass as it was rounded, so that a constant in the terms leaves no trace.
  const double per_s = mass_s > 0 ? 1 / mass_s : 0, per_t = mass_t > 0 ? 1 / mass_t : 0;
  r.centre_s *= per_s, r.centre_t *= per_t;
  r.tilt_s = tilt_s * per_s, r.tilt_t = tilt_t * per_t;
}

inline void reduce_renyi_far(Row<double>& r) {
  double most = floor_of<double>, mass = 0, lost = 0;  // lost: teacher mass where the student is off
  for (int pass = 0; pass < 2; pass++)
    for_blocks(r.classes, [&](int64_t first, int n) {
      const double* s = r.student.get(first, n);
      const double* t = r.teacher.get(first, n);
      vd high = all<vd>(most), total{}, off{};
      sweep<vd>(n, [&](int i, auto w) {
        const vd zs = read_logits<vd>(s + i, w);
        const vd zt = read_logits<vd>(t + i, w);
        const LogProbs<vd> log(r.k, zs, zt, log_ratio(r.k, zs, zt), exp_at_rate(zs - r.k.max_s, r.k.rate_s),
                               exp_at_rate(zt - r.k.max_t, r.k.rate_t));
        const vd term = RenyiFar::log_term(r.k, log);
        if (pass == 0) high = at_least(term, high);
        else total += exp(term - most);
        off += select(zs <= all<vd>(floor_of<double>), log.p_t, vd{});
      });
      most = largest(high), mass += sum(total), lost += sum(off);
    });
  const double alpha = r.k.shape.alpha;
  r.k.log_mixed = most + __builtin_log(mass);
  const bool infinite = most <= floor_of<double> || (alpha > 1 && lost > 0);
  r.value = infinite ? __builtin_inf() : r.k.log_mixed / (alpha - 1);
}
