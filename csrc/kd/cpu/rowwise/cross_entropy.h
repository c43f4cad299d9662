// SPDX-License-Identifier: Apache-2.0
// Cross-entropy at temperature 1 of a measured row, with labels y: log(sum exp z) sum y - sum y z.
// y is `kept` times the label, as a class or as probabilities, plus `spread` everywhere.

template <class S>
struct CrossEntropyRow {
  const bool wanted, by_class;
  bool known = true;  // the label is one of the classes
  int64_t label = -1;
  RowReader<S> probs;
  const S kept, spread;
  S inv_sum = 0, mass = 1, coefficient = 0;
  double value = 0;

  explicit CrossEntropyRow(const Row<S>& r)
      : wanted(r.p.ce_weight != 0), by_class(r.p.labels != nullptr), probs{r.p.label_probs, 0},
        kept(S(1 - r.p.label_smoothing)), spread(S(r.p.label_smoothing / r.p.classes)) {
    if (!wanted) return;
    if (by_class) {
      label = r.p.labels[r.index];
      known = label >= 0 && label < r.p.classes;
    } else {
      probs.offset = row_offset(r.p.label_probs, r.index);
    }
  }

  void measure(const Row<S>& r) {
    inv_sum = S(1 / r.sum_plain);
    double mass_y = 0, dot = 0, off = 0;  // sums of y, of y (z - max), and of y where z is -inf
    if (by_class && known) {
      S z;
      z = *r.student.get(label, 1, &z) - r.k.max_s;
      mass_y = 1;
      if (z > floor_of<S>) dot = kept * (double)z;
      else off = kept;
    }
    if (!by_class || spread != 0) sum_targets(r, mass_y, dot, off);
    mass = S(mass_y);
    value = off > 0 ? __builtin_inf() : __builtin_log(r.sum_plain) * mass_y - dot;
    if (!known || !(r.k.max_s > floor_of<S>)) value = coefficient = S(__builtin_nan(""));
  }

  // Adds what is not one class's: probabilities, and the smoothing.
  void sum_targets(const Row<S>& r, double& mass_y, double& dot, double& off) const {
    using V = typename VectorOf<S>::V;
    const S max_s = r.k.max_s;
    alignas(64) S buffer_s[block], buffer_y[block];
    for_blocks(r.p.classes, [&](int64_t first, int n) {
      const S* s = r.student.get(first, n, buffer_s);
      const S* y = by_class ? nullptr : probs.get(first, n, buffer_y);
      V sum_y{}, sum_yz{}, sum_off{};
      sweep<V>(n, [&](int i, auto w) {
        // Past the end z is the maximum: on, and no part of any sum.
        const V z = read<V>(s + i, w, max_s), zero{};
        const V y_i = by_class ? zero : read<V>(y + i, w, S(0)) * kept, target = y_i + spread;
        const auto on = z > all<V>(floor_of<S>);
        sum_y += y_i;
        sum_yz += select(on, target * (z - max_s), zero);
        sum_off += select(on, zero, target);
      });
      mass_y += sum(sum_y), dot += sum(sum_yz), off += sum(sum_off);
    });
    if (!by_class) mass_y += r.p.label_smoothing;
  }

  // Adds the gradient to that of the divergence.
  void emit(const Row<S>& r, int64_t first, int n, const S* s, S* grad) const {
    using V = typename VectorOf<S>::V;
    const S max_s = r.k.max_s, scale = coefficient * mass * inv_sum;
    const S constant = coefficient * spread, factor = coefficient * kept;
    if (by_class) {
      sweep<V>(n, [&](int i, auto w) {
        const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
        write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - constant));
      });
      if (label >= first && label < first + n) grad[label - first] -= factor;
      return;
    }
    alignas(64) S buffer_y[block];
    const S* y = probs.get(first, n, buffer_y);
    sweep<V>(n, [&](int i, auto w) {
      const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
      const V target = read<V>(y + i, w, S(0)) * factor + constant;
      write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - target));
    });
  }
};
