// SPDX-License-Identifier: Apache-2.0
// The gradients of a row, by all threads of its group.

// Classes [begin, end) that the divergence does not see: the student's have their cross-entropy.
template <class S>
KD_DEVICE void emit_outside(const Row<S>& r, const CrossEntropyRow<S>& ce, int64_t begin,
                            int64_t end, int64_t begin_t, int64_t end_t) {
  const Rows &to_s = r.p.grad_student, &to_t = r.p.grad_teacher;
  const S scale = ce.scale();
  if (to_s.data)
    for_classes(r, begin, end, [&](int64_t i) {
      const S z = at_least(ce.student.at(i), floor_of<S>);
      write_element(to_s, row_offset(to_s, r.index) + i * to_s.class_stride,
                    ce.wanted ? gradient_of(ce, i, z, scale) : S(0));
    });
  if (to_t.data)
    for_classes(r, begin_t, end_t, [&](int64_t i) {
      write_element(to_t, row_offset(to_t, r.index) + i * to_t.class_stride, S(0));
    });
}

template <class C, bool alone, class S>
KD_DEVICE void emit(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling) {
  constexpr int W = width<S>;
  const RowwiseParams& p = r.p;
  const Rows &to_s = p.grad_student, &to_t = p.grad_teacher;
  const int64_t at_s = to_s.data ? row_offset(to_s, r.index) + p.first * to_s.class_stride : 0;
  const int64_t at_t = to_t.data ? row_offset(to_t, r.index) + p.teacher_first * to_t.class_stride : 0;
  const auto k = for_sweep(r);
  const S share = S(r.share), factor_s = S(scaling.student), factor_t = S(scaling.teacher);
  const S centre_s = S(r.share * r.centre_s + r.shift_s);
  const S centre_t = S(r.share * r.centre_t + r.shift_t);
  const S origin_s = r.origin_s(), origin_t = r.origin_t();
  const Exponent<S> plain(exp_rate<S>(1), ce.own.max);
  const S ce_scale = ce.wanted ? ce.scale() * plain.made_good() : S(0);
  const S spread = ce.coefficient * ce.spread;
  const bool standardize = p.standardize, slopes = wants_slopes(r) && !standardize;
  const bool teacher_too = to_t.data || slopes;
  const bool shifted = p.target == Target::decoupled;  // else `alone` has no centre
  const auto away = [](S z, const Side<S>& side, double spread) {
    return z > floor_of<S> ? (z - S(side.mean)) * S(spread) : S(0);
  };
  const int lead = lead_of(r.student.reader);
  const bool packs_s = aligned_packs(to_s, at_s - lead), packs_t = aligned_packs(to_t, at_t - lead);
  if (to_s.data == p.student.data) r.group.sync();  // others may be about to look at a class of it
  emit_outside(r, ce, 0, p.first, 0, p.teacher_first);
  S value = 0, slope_s = 0, slope_t = 0, drift_s = 0, drift_t = 0;
  for_chunks<true>(r, [&](const Chunk<S>& chunk) {
    S grad_s[W], grad_t[W];
    Class<S> terms[W];
    terms_of<C>(k, chunk, terms);
    for (int j = 0; j < W; j++) {
      const S s = at_least(chunk.s[j], floor_of<S>), t = at_least(chunk.t[j], floor_of<S>);
      const Class<S>& c = terms[j];
      if (alone) {
        value += c.value;
        grad_s[j] = fused(c.student, share * factor_s, S(0));  // a product would have its sign apart
        if (shifted) grad_s[j] -= c.p_s * (centre_s * factor_s);
        continue;
      }
      const S du = c.student * share - c.p_s * centre_s;
      grad_s[j] = du * factor_s;
      if (standardize) grad_s[j] -= away(s, r.student, scaling.spread_s);
      grad_t[j] = 0;
      if (!teacher_too) continue;
      const S dv = c.teacher * share - c.p_t * centre_t;
      grad_t[j] = dv * factor_t;
      if (standardize) grad_t[j] -= away(t, r.teacher, scaling.spread_t);
      slope_s += du * (s - origin_s), slope_t += dv * (t - origin_t);
      drift_s += du, drift_t += dv;
    }
    if (r.target >= 0 && r.target >= chunk.first && r.target < chunk.first + W) {
      S own_s = 0, own_t = 0;
      for (int j = 0; j < W; j++)
        if (chunk.first + j == r.target) own_s = grad_s[j], own_t = alone ? S(0) : grad_t[j];
      emit_target(r, ce, scaling, own_s, own_t);
      for (int j = 0; j < W; j++)
        if (chunk.first + j == r.target) grad_s[j] = own_s, grad_t[j] = own_t;
    }
    if (to_s.data) {
      if (ce.wanted) {
        for (int j = 0; j < W; j++) grad_s[j] += fused(exp_of(plain(chunk.s[j])), ce_scale, -spread);
        take_labels(ce, p.first + chunk.first, grad_s);
      }
      write(to_s, at_s, chunk.first, r.classes, chunk.whole && packs_s, grad_s);
    }
    if (!alone && to_t.data) write(to_t, at_t, chunk.first, r.classes, chunk.whole && packs_t, grad_t);
  });
  emit_outside(r, ce, p.first + r.classes, p.classes, p.teacher_first + r.classes,
               p.teacher_classes);
  if (alone) {
    double sums[1] = {value};
    r.group.template all_reduce<1, 0>(sums);
    r.value += sums[0];
  } else if (slopes) {
    // du sums to 0, but for the rounding of its centre.
    double sums[4] = {slope_s, slope_t, drift_s, drift_t};
    r.group.template all_reduce<4, 0>(sums);
    r.slope_s += sums[0] - sums[2] * r.tilt_s;
    r.slope_t += sums[1] - sums[3] * r.tilt_t;
  }
}
