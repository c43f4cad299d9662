// SPDX-License-Identifier: Apache-2.0
// Cross-entropy at temperature 1 of a measured row, with labels y: log(sum exp z) sum y - sum y z.

template <class S>
struct CrossEntropyRow {
  bool wanted, known = true;  // known: the label is one of the classes
  int64_t label = -1;
  RowReader<S> probs;
  S kept, spread;  // y = kept * label + spread
  S inv_sum = 0, mass = 1, coefficient = 0;
  double value = 0;

  explicit CrossEntropyRow(const Row<S>& r)
      : wanted(r.p.ce_weight != 0), probs{r.p.label_probs, 0}, kept(S(1 - r.p.label_smoothing)),
        spread(S(r.p.label_smoothing / r.p.classes)) {
    if (!wanted) return;
    if (r.p.labels) {
      label = r.p.labels[r.index];
      known = label >= 0 && label < r.p.classes;
    } else {
      probs.offset = row_offset(r.p.label_probs, r.index);
    }
  }

  const S* targets(const Row<S>& r, int64_t first, int n, S* buffer) const {
    if (r.p.labels) {
      for (int i = 0; i < n; i++) buffer[i] = spread;
      if (label >= first && label < first + n) buffer[label - first] += kept;
      return buffer;
    }
    const S* y = probs.get(first, n, buffer);
    if (spread == 0) return y;
    for (int i = 0; i < n; i++) buffer[i] = kept * y[i] + spread;
    return buffer;
  }

  void measure(const Row<S>& r) {
    using V = typename VectorOf<S>::V;
    alignas(64) S buffer_s[block], buffer_y[block];
    const S max_s = r.k.max_s;
    double total = 0, mass_y = 0, dot = 0;
    bool infinite = false;
    for_blocks(r.p.classes, [&](int64_t first, int n) {
      const S* s = r.student.get(first, n, buffer_s);
      const S* y = targets(r, first, n, buffer_y);
      V sum_exp{}, sum_y{}, sum_yz{}, off{};
      sweep<V>(n, [&](int i, auto w) {
        const V z = read_logits<V>(s + i, w), centred = z - max_s;
        const V target = read<V>(y + i, w, S(0)), zero{};
        const auto on = z > all<V>(floor_of<S>);
        sum_exp += exp_at_rate(centred, exp_rate<S>(1));
        sum_y += target;
        sum_yz += select(on, target * centred, zero);
        off += select(on, zero, target);
      });
      total += sum(sum_exp), mass_y += sum(sum_y), dot += sum(sum_yz);
      infinite |= sum(off) > 0;
    });
    inv_sum = S(1 / total), mass = S(mass_y);
    value = infinite ? __builtin_inf() : __builtin_log(total) * mass_y - dot;
    if (!known || !(r.k.max_s > floor_of<S>)) value = coefficient = S(__builtin_nan(""));
  }

  // Adds the gradient to that of the divergence.
  void emit(const Row<S>& r, int64_t first, int n, const S* s, S* grad) const {
    using V = typename VectorOf<S>::V;
    alignas(64) S buffer_y[block];
    const S* y = targets(r, first, n, buffer_y);
    const S max_s = r.k.max_s, inverse = inv_sum, y_mass = mass, factor = coefficient;
    sweep<V>(n, [&](int i, auto w) {
      const V p = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1)) * inverse;
      const V g = p * y_mass - read<V>(y + i, w, S(0));
      write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + g * factor);
    });
  }
};
