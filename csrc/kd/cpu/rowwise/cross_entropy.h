// SPDX-License-Identifier: Apache-2.0
// What a measured row has at temperature 1, over all its classes: its normalisers, and the
// cross-entropy with labels y, log(sum exp z) sum y - sum y z. y is `kept` times the label, as a
// class or as probabilities, plus `spread` everywhere.

template <class S>
struct Normaliser {
  S max = 0;
  double sum = 0;  // of exp(z - max)

  double log_prob(S z) const { return z > floor_of<S> ? (double)z - max - __builtin_log(sum) : -__builtin_inf(); }
};

// Of a whole row, where the divergence is over a window of it.
template <class S>
Normaliser<S> normaliser_of(const RowReader<S>& reader, int64_t classes) {
  using V = typename VectorOf<S>::V;
  Normaliser<S> all_classes{floor_of<S>, 0};
  alignas(64) S buffer[block];
  for (int pass = 0; pass < 2; pass++)
    for_blocks(classes, [&](int64_t first, int n) {
      const S* z = reader.get(first, n, buffer);
      const S max = all_classes.max;
      V high = all<V>(max), total{};
      sweep<V>(n, [&](int i, auto w) {
        if (pass == 0) high = at_least(read<V>(z + i, w, floor_of<S>), high);
        else total += exp_at_rate(read_logits<V>(z + i, w) - max, exp_rate<S>(1));
      });
      if (pass == 0) all_classes.max = largest(high);
      else all_classes.sum += sum(total);
    });
  return all_classes;
}

template <class S>
struct CrossEntropyRow {
  const RowwiseParams& p;
  const bool by_class;
  bool wanted;             // the student's gradient has a part of it
  bool known = true;       // the label is one of the classes
  int64_t label = -1, target = -1;
  RowReader<S> student, probs;
  const S kept, spread;
  Normaliser<S> own;
  double value = 0;
  // In the gradient's units: of the cross-entropy with y, and of that with the target alone.
  S coefficient = 0, target_coefficient = 0;
  S mass = 1;              // sum y

  explicit CrossEntropyRow(const Row<S>& r)
      : p(r.p), by_class(r.p.labels != nullptr),
        wanted(r.p.ce_weight != 0 || r.p.target == Target::separate),
        student{r.p.student, row_offset(r.p.student, r.index)},
        probs{r.p.label_probs, 0},
        kept(S(1 - r.p.label_smoothing)), spread(S(r.p.label_smoothing / r.p.classes)) {
    if (by_class) {
      label = p.labels[r.index];
      known = label >= 0 && label < p.classes;
    } else if (p.label_probs.data) {
      probs.offset = row_offset(p.label_probs, r.index);
    }
  }

  S logit(int64_t c) const {
    S z;
    return *student.get(c, 1, &z);
  }

  void measure(const Normaliser<S>& normaliser) {
    own = normaliser;
    double mass_y = 0, dot = 0, off = 0;  // sums of y, of y (z - max), and of y where z is -inf
    if (by_class && known) {
      const S z = logit(label) - own.max;
      mass_y = 1;
      if (z > floor_of<S>) dot = kept * (double)z;
      else off = kept;
    }
    if (!by_class || spread != 0) sum_targets(mass_y, dot, off);
    mass = S(mass_y);
    value = off > 0 ? __builtin_inf() : __builtin_log(own.sum) * mass_y - dot;
    if (!known || !(own.max > floor_of<S>)) value = __builtin_nan("");
  }

  // Adds what is not one class's: probabilities, and the smoothing.
  void sum_targets(double& mass_y, double& dot, double& off) const {
    using V = typename VectorOf<S>::V;
    const S max_s = own.max;
    alignas(64) S buffer_s[block], buffer_y[block];
    for_blocks(p.classes, [&](int64_t first, int n) {
      const S* s = student.get(first, n, buffer_s);
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
    if (!by_class) mass_y += p.label_smoothing;
  }

  // Adds the gradient for classes [first, first + n), whose logits are `s`, to the divergence's.
  void emit(int64_t first, int n, const S* s, S* grad) const {
    using V = typename VectorOf<S>::V;
    const S max_s = own.max, scale = S((coefficient * mass + target_coefficient) / own.sum);
    const S constant = coefficient * spread, factor = coefficient * kept;
    const auto add = [&](int64_t c, S amount) {
      if (c >= first && c < first + n) grad[c - first] += amount;
    };
    if (by_class || coefficient == 0) {
      sweep<V>(n, [&](int i, auto w) {
        const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
        write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - constant));
      });
      add(label, -factor);
    } else {
      alignas(64) S buffer_y[block];
      const S* y = probs.get(first, n, buffer_y);
      sweep<V>(n, [&](int i, auto w) {
        const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
        const V target = read<V>(y + i, w, S(0)) * factor + constant;
        write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - target));
      });
    }
    add(target, -target_coefficient);
  }
  // The part of a class that `s` did not show.
  S missing(S z) const {
    const S e = z > floor_of<S> ? S(__builtin_exp((double)z - own.max)) : S(0);
    return e * S((coefficient * mass + target_coefficient) / own.sum);
  }
};
