// SPDX-License-Identifier: Apache-2.0
// Rows of one block in fp32 whose teachers need no gradient: the loss from the sums of `measure`,
// and the student's gradient from the exponentials that it kept.

// A sum's divergences. With a and b as the excess and the bend over the student's sum, that of a
// close teacher is (b - ((1 + a) log(1 + a) - a)) / (1 + a); false where this cancels, as it may
// where all but a few classes are the same.
inline bool add_up(const Row<float>& r, Teacher<float>* teachers, int64_t count) {
  for (int64_t m = 0; m < count; m++) {
    Teacher<float>& t = teachers[m];
    t.value = t.dot / t.sum - t.delta;
    if (!t.close) continue;
    const double bend = t.bend / r.sum_s, lost = (1 + t.ratio) * (t.delta - t.shift) - t.ratio;
    if (lost > 0.5 * bend) {
      for (int64_t k = 0; k <= m; k++) teachers[k].value = 0;  // the steps add to it
      return false;
    }
    t.value = (bend - lost) / (1 + t.ratio);
  }
  return true;
}

// `factor` times the sum of w_m (p_m - p_s): of every teacher's `kept` its `share`, and the result
// of exp(u_s).
inline float share_out(const Row<float>& r, Teacher<float>* teachers, int64_t count,
                       double factor) {
  double own = 0;
  for (int64_t m = 0; m < count; m++) {
    Teacher<float>& t = teachers[m];
    const double weight = factor * t.weight;
    t.share = float(weight * t.k.inv_sum_t * t.scale);
    t.kept = t.close ? t.gaps : t.exps;
    own -= t.close ? t.share * t.ratio : weight * r.k.inv_sum_s;
  }
  return (float)own;
}

// That, for all classes; and sum w_m p_m, if `q`.
inline void combine(const Row<float>& r, const Teacher<float>* teachers, int64_t count, float own,
                    float* gap, float* q, const float* next_grad) {
  constexpr int some = 4;  // teachers at a time, those that are not there without a share
  for (int64_t first = 0; first < count; first += some) {
    const float *kept[some], *exps[some];
    float share[some];
    for (int j = 0; j < some; j++) {
      const bool there = first + j < count;
      const Teacher<float>& t = teachers[there ? first + j : 0];
      kept[j] = t.kept, exps[j] = t.exps, share[j] = there ? t.share : 0;
    }
    sweep<vf>((int)r.classes, [&](int i, auto w) {
      __builtin_prefetch(next_grad + i, 1, 2);
      vf sum = first ? read<vf>(gap + i, w, 0.f) : read<vf>(r.exp_s + i, w, 0.f) * own;
      for (int j = 0; j < some; j++) sum += read<vf>(kept[j] + i, w, 0.f) * share[j];
      write<vf>(gap + i, w, sum);
      if (!q) return;
      sum = first ? read<vf>(q + i, w, 0.f) : vf{};
      for (int j = 0; j < some; j++) sum += read<vf>(exps[j] + i, w, 0.f) * share[j];
      write<vf>(q + i, w, sum);
    });
  }
}

// The mixture's divergence, and the student's gradient; false where the teachers' normalisers are
// off by so much more that the gaps have lost digits.
inline bool mix(Ensemble<float>& e, float* grad, const float* gap, const float* q) {
  vf value{};
  const int n = (int)e.p.classes;
  const float* s = e.r.student.get(0, n);
  const float* exp_s = e.r.exp_s;
  const float factor = (float)-e.factor_s;
  sweep<vf>(n, [&, k = e.r.k](int i, auto w) {
    const vf g = read<vf>(gap + i, w, 0.f);
    value += mixed(k, read<vf>(exp_s + i, w, 0.f) * k.inv_sum_s, read<vf>(q + i, w, 0.f), g,
                   read_logits<vf>(s + i, w)).value;
    write<vf>(grad + i, w, g * factor);
  });
  double off = 0;
  for (int64_t m = 0; m < e.count; m++) {
    const Teacher<float>& t = e.teachers[m];
    if (t.close) off += t.weight * t.ratio * t.ratio;
  }
  if (off > 16 * sum(value)) return false;
  e.r.value = sum(value);
  return true;
}

// False where the row is to take the steps.
inline bool at_once(Ensemble<float>& e, const CrossEntropyRow<float>& ce) {
  Row<float>& r = e.r;
  if (e.teacher_side || r.classes > block) return false;
  const bool mixture = e.p.mixture;
  if (!mixture && !add_up(r, e.teachers, e.count)) return false;
  const RowWriter<float> to_s(e.p.grad_student, r.index, false);
  if (!mixture && !to_s.wanted()) return true;
  alignas(64) float out[block];
  const int n = (int)r.classes;
  float* grad = to_s.wanted() ? to_s.at(0, out) : out;
  const float own = share_out(r, e.teachers, e.count, mixture ? 1 : -e.factor_s);
  combine(r, e.teachers, e.count, own, mixture ? r.exp_t : grad, mixture ? out : nullptr,
          next_row(grad, out, e.p.grad_student));
  if (mixture && !mix(e, grad, r.exp_t, out)) return false;
  if (!to_s.wanted()) return true;
  if (ce.wanted) add_gradient(ce, 0, n, r.student.get(0, n), grad);
  to_s.flush(0, n, grad);
  return true;
}
inline bool at_once(Ensemble<double>&, const CrossEntropyRow<double>&) { return false; }
