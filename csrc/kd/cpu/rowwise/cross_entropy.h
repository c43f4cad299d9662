// SPDX-License-Identifier: Apache-2.0
// The sweeps of the cross-entropy.

template <class S>
Normaliser<S> normaliser_of(const Row<S>&, const RowReader<S>& reader, int64_t classes) {
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
void sum_targets(const CrossEntropyRow<S>& ce, double& mass_y, double& dot, double& off) {
  using V = typename VectorOf<S>::V;
  const S max_s = ce.own.max;
  alignas(64) S buffer_s[block], buffer_y[block];
  for_blocks(ce.p.classes, [&](int64_t first, int n) {
    const S* s = ce.student.get(first, n, buffer_s);
    const S* y = ce.by_class ? nullptr : ce.probs.get(first, n, buffer_y);
    V sum_y{}, sum_yz{}, sum_off{};
    sweep<V>(n, [&](int i, auto w) {
      // Past the end z is the maximum: on, and no part of any sum.
      const V z = read<V>(s + i, w, max_s), zero{};
      const V y_i = ce.by_class ? zero : read<V>(y + i, w, S(0)) * ce.kept, target = y_i + ce.spread;
      const auto on = z > all<V>(floor_of<S>);
      sum_y += y_i;
      sum_yz += select(on, target * (z - max_s), zero);
      sum_off += select(on, zero, target);
    });
    mass_y += sum(sum_y), dot += sum(sum_yz), off += sum(sum_off);
  });
}

// Adds the gradient for classes [first, first + n), whose logits are `s`, to the divergence's.
template <class S>
void add_gradient(const CrossEntropyRow<S>& ce, int64_t first, int n, const S* s, S* grad) {
  using V = typename VectorOf<S>::V;
  const S max_s = ce.own.max, scale = ce.scale();
  const S constant = ce.coefficient * ce.spread, factor = ce.coefficient * ce.kept;
  const auto add = [&](int64_t c, S amount) {
    if (c >= first && c < first + n) grad[c - first] += amount;
  };
  if (ce.by_class || ce.coefficient == 0) {
    sweep<V>(n, [&](int i, auto w) {
      const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
      write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - constant));
    });
    add(ce.label, -factor);
  } else {
    alignas(64) S buffer_y[block];
    const S* y = ce.probs.get(first, n, buffer_y);
    sweep<V>(n, [&](int i, auto w) {
      const V e = exp_at_rate(read_logits<V>(s + i, w) - max_s, exp_rate<S>(1));
      const V target = read<V>(y + i, w, S(0)) * factor + constant;
      write<V>(grad + i, w, read<V>(grad + i, w, S(0)) + (e * scale - target));
    });
  }
  add(ce.target, -ce.target_coefficient);
}
