// SPDX-License-Identifier: Apache-2.0
// The sweeps of the cross-entropy over all of a row's classes, read from where they lie: but for
// labels that are probabilities or smoothed, windows and WSLD there are none.

template <class S, class Body>
KD_DEVICE void for_classes(const Row<S>& r, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin + r.group.index; i < end; i += r.group.count) body(i);
}

template <class S>
KD_DEVICE Normaliser<S> normaliser_of(const Row<S>& r, const RowReader<S>& reader, int64_t classes) {
  double max[1] = {floor_of<S>}, sum[1] = {};
  for_classes(r, 0, classes, [&](int64_t i) {
    const S z = reader.at(i);
    if (z > max[0]) max[0] = z;
  });
  r.group.template all_reduce<0, 1>(max);
  for_classes(r, 0, classes, [&](int64_t i) {
    sum[0] += exp_at_rate(at_least(reader.at(i), floor_of<S>) - (S)max[0], exp_rate<S>(1));
  });
  r.group.template all_reduce<1, 0>(sum);
  return {(S)max[0], sum[0]};
}

template <class S>
KD_DEVICE void sum_targets(const CrossEntropyRow<S>& ce, double& mass_y, double& dot, double& off) {
  double sums[3] = {};
  for_classes(ce.row, 0, ce.p.classes, [&](int64_t i) {
    const S z = ce.student.at(i);
    const S y = ce.by_class ? S(0) : ce.probs.at(i) * ce.kept, target = y + ce.spread;
    sums[0] += y;
    if (z > floor_of<S>) sums[1] += target * (z - ce.own.max);
    else sums[2] += target;
  });
  ce.row.group.template all_reduce<3, 0>(sums);
  mass_y += sums[0], dot += sums[1], off += sums[2];
}

// Of class `i`, whose logit is z.
template <class S>
KD_DEVICE S gradient_of(const CrossEntropyRow<S>& ce, int64_t i, S z, S scale) {
  const S e = exp_at_rate(z - ce.own.max, exp_rate<S>(1));
  S grad = e * scale - ce.coefficient * ce.spread;
  if (i == ce.label) grad -= ce.coefficient * ce.kept;
  if (i == ce.target) grad -= ce.target_coefficient;
  if (!ce.by_class && ce.coefficient != 0) grad -= ce.coefficient * ce.kept * ce.probs.at(i);
  return grad;
}

// What the labels take from the gradients of a chunk of the whole row's classes.
template <class S>
KD_DEVICE void take_labels(const CrossEntropyRow<S>& ce, int64_t first, S (&grad)[width<S>]) {
  const auto take = [&](int64_t i, S share) {
    if (i < first || i >= first + width<S>) return;
    for (int j = 0; j < width<S>; j++)
      if (first + j == i) grad[j] -= share;
  };
  take(ce.label, ce.coefficient * ce.kept), take(ce.target, ce.target_coefficient);
  if (ce.by_class || ce.coefficient == 0) return;
  for (int j = 0; j < width<S>; j++)
    if (first + j >= 0 && first + j < ce.p.classes)
      grad[j] -= ce.coefficient * ce.kept * ce.probs.at(first + j);
}
