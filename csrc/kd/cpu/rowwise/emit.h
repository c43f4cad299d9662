// SPDX-License-Identifier: Apache-2.0
// The third step: the gradients of a row.

// Classes that the divergence does not see: the student's have their cross-entropy.
template <class S>
void emit_outside(const CrossEntropyRow<S>& ce, const RowWriter<S>& to_s,
                  const RowWriter<S>& to_t, int64_t begin, int64_t end, int64_t begin_t,
                  int64_t end_t) {
  if (begin == end && begin_t == end_t) return;
  alignas(64) S buffer[block], out[block];
  for_blocks(to_s.wanted() ? end - begin : 0, [&](int64_t first, int n) {
    S* grad = to_s.at(begin + first, out);
    __builtin_memset(grad, 0, n * sizeof(S));
    if (ce.wanted) add_gradient(ce, begin + first, n, ce.student.get(begin + first, n, buffer), grad);
    to_s.flush(begin + first, n, grad);
  });
  for_blocks(to_t.wanted() ? end_t - begin_t : 0, [&](int64_t first, int n) {
    S* grad = to_t.at(begin_t + first, out);
    __builtin_memset(grad, 0, n * sizeof(S));
    to_t.flush(begin_t + first, n, grad);
  });
}

// `alone`: of a standardised row, which is then of one block, with the slope that its deviation has.
template <class C, bool alone, class S>
void emit(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  using V = typename VectorOf<S>::V;
  const RowwiseParams& p = r.p;
  const RowWriter<S> to_s(p.grad_student, r.index, p.grad_student.data == p.student.data);
  const RowWriter<S> to_t(p.grad_teacher, r.index, false);
  alignas(64) S out_s[block], out_t[block];
  emit_outside(ce, to_s, to_t, 0, p.first, 0, p.teacher_first);
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* s = r.student.get(first, n);
    const S* t = r.teacher.get(first, n);
    S* grad_s = to_s.wanted() ? to_s.at(p.first + first, out_s) : out_s;
    S* grad_t = to_t.wanted() ? to_t.at(p.teacher_first + first, out_t) : out_t;
    // Copies that no store can alias.
    const Scalars<S> k = r.k;
    const S share = S(r.share), factor_s = S(scaling.student), factor_t = S(scaling.teacher);
    const S centre_s = S(r.share * r.centre_s + r.shift_s);
    const S centre_t = S(r.share * r.centre_t + r.shift_t);
    const S origin_s = r.origin_s(), origin_t = r.origin_t();
    const bool standardize = p.standardize, slopes = p.row_grads && !standardize;
    const bool teacher_too = to_t.wanted() || slopes;
    exponentials(r, n, s, t);
    Sum<V> value;
    V slope_s{}, slope_t{}, drift_s{}, drift_t{};
    sweep<V>(n, [&](int i, auto w) {
      const V zs = read_logits<V>(s + i, w), zt = read_logits<V>(t + i, w);
      const Class<V> c = terms_of<C>(r, k, i, w, zs, zt);
      if (alone) {
        const V grad = c.student * (share * factor_s) - c.p_s * (centre_s * factor_s);
        write<V>(grad_s + i, w, grad);
        value += c.value;
        if (standardize) slope_s += grad * (zs - origin_s);
        return;
      }
      const V du = c.student * share - c.p_s * centre_s;
      write<V>(grad_s + i, w, du * factor_s);
      if (!teacher_too) return;
      const V dv = c.teacher * share - c.p_t * centre_t;
      write<V>(grad_t + i, w, dv * factor_t);
      slope_s += du * (zs - origin_s), slope_t += dv * (zt - origin_t);
      drift_s += du, drift_t += dv;
    }, [&] { if (alone) value.fold(); });
    if (alone) r.value += sum(value);
    if (standardize) {
      if (alone) {
        r.add_target_slopes(0, 0);
        scaling.spread_s = (sum(slope_s) + scaling.student * r.slope_s) * r.student.spread;
      }
      through_deviation(r.student, scaling.spread_s, n, s, grad_s);
      if (to_t.wanted()) through_deviation(r.teacher, scaling.spread_t, n, t, grad_t);
    }
    // du sums to 0, but for the rounding of its centre.
    if (slopes) r.slope_s += sum(slope_s) - sum(drift_s) * r.tilt_s;
    if (slopes) r.slope_t += sum(slope_t) - sum(drift_t) * r.tilt_t;
    if (r.target >= first && r.target < first + n)
      emit_target(r, ce, scaling, grad_s[r.target - first], grad_t[r.target - first]);
    if (to_s.wanted()) {
      if (ce.wanted) add_gradient(ce, p.first + first, n, s, grad_s);
      to_s.flush(p.first + first, n, grad_s);
    }
    if (to_t.wanted()) to_t.flush(p.teacher_first + first, n, grad_t);
  });
  emit_outside(ce, to_s, to_t, p.first + r.classes, p.classes, p.teacher_first + r.classes,
               p.teacher_classes);
}
