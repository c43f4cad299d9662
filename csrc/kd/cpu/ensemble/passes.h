// SPDX-License-Identifier: Apache-2.0
// The second and third steps, `reduce` and `emit`, of any row.

// A row, its teachers, and what is made of them.
template <class S>
struct Ensemble {
  const EnsembleParams& p;
  Row<S>& r;
  Teacher<S>* teachers;
  int64_t count;
  bool teacher_side;             // a gradient to teachers, or to what is one number a row
  double factor_s = 0, factor_t = 0;  // of the saved gradients, per du of either side
  bool infinite = false;
  double finite = 0;             // what is finite of the loss

  void finish(const CrossEntropyRow<S>& ce) {
    normalise();
    if (at_once(*this, ce)) return settle();
    const bool gradients = p.grad_student.data || teacher_side;
    if (gradients && !teacher_side) {
      p.mixture ? pass<true, true, true>(ce) : pass<false, true, true>(ce);
      return settle();
    }
    p.mixture ? pass<true, true, false>(ce) : pass<false, true, false>(ce);
    settle();
    if (gradients) p.mixture ? pass<true, false, true>(ce) : pass<false, false, true>(ce);
  }

  void normalise() {
    bool sound = is_sound(r);
    for (int64_t m = 0; m < count; m++) sound = sound && is_sound(teachers[m]);
    if (!sound) r.sum_s = __builtin_nan("");  // and so is all that is divided by it
    r.k.inv_sum_s = S(1 / r.sum_s);
    if (sizeof(S) == 8) r.k.log_sum_s = S(__builtin_log(r.sum_s));  // no fp32 term takes it
    for (int64_t m = 0; m < count; m++) {
      Teacher<S>& t = teachers[m];
      kd::KD_ISA::normalise(r, t);
      if (!sound) t.k.inv_sum_t = S(__builtin_nan(""));
    }
  }

  // The loss, and which divergences are infinite: these move nothing but the student.
  void settle() {
    for (int64_t m = 0; m < count; m++) {
      Teacher<S>& t = teachers[m];
      const double value = p.mixture ? r.value : t.value;
      t.infinite = value > beyond;
      infinite = infinite || (t.infinite && (p.mixture || t.weight != 0));
      if (!p.mixture && !t.infinite) finite += t.weight * value;
      t.centre = t.infinite ? 0 : t.centre / t.mass;
    }
    if (p.mixture && !(r.value > beyond)) finite = r.value;
  }

  // `reduces`: the divergences and the teachers' sums; `emits`: the gradients, by those.
  template <bool mixture, bool reduces, bool emits>
  void pass(const CrossEntropyRow<S>& ce) {
    using V = typename VectorOf<S>::V;
    const RowWriter<S> to_s(p.grad_student, r.index, false);
    alignas(64) S buffer_t[block], out[block], q[block];
    S* gap = r.exp_t;
    for_blocks(p.classes, [&](int64_t first, int n) {
      const S* s = r.student.get(first, n);
      const Scalars<S> k = r.k;
      if (p.classes > block)
        sweep<V>(n, [&](int i, auto w) {
          write<V>(r.exp_s + i, w, exp_at_rate(read_logits<V>(s + i, w) - k.max_s, k.rate_s));
        });
      __builtin_memset(gap, 0, n * sizeof(S));
      if (mixture) __builtin_memset(q, 0, n * sizeof(S));
      for (int64_t m = 0; m < count; m++)
        add<mixture, reduces, emits>(teachers[m], first, n, s, buffer_t, gap, q);
      if (mixture) {
        V value{}, slope{};
        sweep<V>(n, [&](int i, auto w) {
          const V z = read_logits<V>(s + i, w), g = read<V>(gap + i, w, S(0));
          const Mixed<V> c = mixed(k, read<V>(r.exp_s + i, w, S(0)) * k.inv_sum_s,
                                   read<V>(q + i, w, S(0)), g, z);
          write<V>(q + i, w, c.d);
          value += c.value, slope -= g * (z - k.max_s);
        });
        if (reduces) r.value += sum(value);
        if (emits) r.slope_s += sum(slope);
        for (int64_t m = 0; teacher_side && m < count; m++) {
          Teacher<S>& t = teachers[m];
          const S* z = t.get(r.index, first, n, buffer_t);
          const auto terms = terms_of<V>(t, s, z);
          V to_weight{};  // less what is the same for all teachers
          teacher<reduces, emits>(t, first, n, z, [&](int i, auto w) {
            const Term<V> c = terms(i, w);
            const V d = read<V>(q + i, w, S(0));
            to_weight += c.gap * d;
            return Share<V>{c.q, d};
          });
          if (reduces) t.value += sum(to_weight);
        }
      }
      if (!emits || !to_s.wanted()) return;
      S* grad = to_s.at(first, out);
      const S factor = S(-factor_s);
      sweep<V>(n, [&](int i, auto w) {
        write<V>(grad + i, w, read<V>(gap + i, w, S(0)) * factor);
      });
      if (ce.wanted) add_gradient(ce, first, n, s, grad);
      to_s.flush(first, n, grad);
    });
  }

  template <class V>
  KD_FN auto terms_of(const Teacher<S>& t, const S* s, const S* z) const {
    const Scalars<S> k = t.k;
    const S *exp_s = r.exp_s, *exps = t.exps;
    return [k, s, z, exp_s, exps, inv_sum_s = r.k.inv_sum_s](int i, auto w) {
      return term(k, read<V>(exp_s + i, w, S(0)) * inv_sum_s, read_logits<V>(s + i, w),
                  read_logits<V>(z + i, w), read<V>(exps + i, w, S(0)));
    };
  }

  // Adds w_m p_m and w_m (p_m - p_s) of a block; in a sum, the divergence and its gradients too.
  template <bool mixture, bool reduces, bool emits>
  void add(Teacher<S>& t, int64_t first, int n, const S* s, S* buffer, S* gap, S* q) {
    using V = typename VectorOf<S>::V;
    const S* z = t.get(r.index, first, n, buffer);
    const Scalars<S> k = t.k;
    S* exps = t.exps;
    if (p.classes > block)
      sweep<V>(n, [&](int i, auto w) {
        write<V>(exps + i, w, exp_at_rate(read_logits<V>(z + i, w) - k.max_t, k.rate_t));
      });
    const S weight = S(t.weight);
    const auto terms = terms_of<V>(t, s, z);
    V value{};
    sweep<V>(n, [&](int i, auto w) {
      const Term<V> c = terms(i, w);
      write<V>(gap + i, w, read<V>(gap + i, w, S(0)) + weight * c.gap);
      if (mixture) write<V>(q + i, w, read<V>(q + i, w, S(0)) + weight * c.q);
      value += c.value;
    });
    if (mixture) return;
    if (reduces) t.value += sum(value);
    if (!teacher_side) return;
    V slope{};
    teacher<reduces, emits>(t, first, n, z, [&](int i, auto w) {
      const Term<V> c = terms(i, w);
      slope -= c.gap * (read_logits<V>(s + i, w) - k.max_s);
      return Share<V>{c.q, c.d};
    });
    if (emits) t.slope_s += sum(slope);
  }

  template <class V>
  struct Share {
    V q, d;  // p_m, and the derivative to it: log(p_m / p_s), or the mixture's
  };
  // A teacher's sums, or its gradients p_m (d - centre), from its Share of every class.
  template <bool reduces, bool emits, class Sides>
  void teacher(Teacher<S>& t, int64_t first, int n, const S* z, const Sides& sides) {
    using V = typename VectorOf<S>::V;
    const RowWriter<S> to_t(t.p->grad, r.index, false);
    alignas(64) S out[block];
    S* grad = emits && to_t.wanted() ? to_t.at(first, out) : out;
    const S max_t = t.k.max_t, centre = S(t.centre);
    const S factor = S(t.infinite ? 0 : t.weight * factor_t);
    V mass{}, weighted{}, slope{};
    sweep<V>(n, [&](int i, auto w) {
      const Share<V> c = sides(i, w);
      if (reduces) mass += c.q, weighted += c.q * c.d;
      if (emits) {
        const V dv = c.q * (c.d - centre);
        write<V>(grad + i, w, dv * factor);
        slope += dv * (read_logits<V>(z + i, w) - max_t);
      }
    });
    if (reduces) t.mass += sum(mass), t.centre += sum(weighted);
    if (emits) t.slope_t += sum(slope);
    if (emits && to_t.wanted()) to_t.flush(first, n, grad);
  }
};
