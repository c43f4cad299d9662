// SPDX-License-Identifier: Apache-2.0
// The cross-entropy of a row with labels y, log(sum exp z) sum y - sum y z, at temperature 1. y is
// `kept` times the label, as a class or as probabilities, plus `spread` everywhere.

template <class S>
struct CrossEntropyRow {
  const Row<S>& row;
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

  KD_ROW explicit CrossEntropyRow(const Row<S>& r)
      : row(r), p(r.p), by_class(r.p.labels != nullptr),
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

  KD_ROW void measure(const Normaliser<S>& normaliser) {
    own = normaliser;
    double mass_y = 0, dot = 0, off = 0;  // sums of y, of y (z - max), and of y where z is -inf
    if (by_class && known) {
      const S z = student.at(label) - own.max;
      mass_y = 1;
      if (z > floor_of<S>) dot = kept * (double)z;
      else off = kept;
    }
    if (!by_class || spread != 0) sum_targets(*this, mass_y, dot, off);
    if (!by_class) mass_y += p.label_smoothing;
    mass = S(mass_y);
    value = off > 0 ? __builtin_inf() : __builtin_log(own.sum) * mass_y - dot;
    if (!known || !(own.max > floor_of<S>)) value = __builtin_nan("");
  }

  // What the gradient has of exp(z - max) of a class.
  KD_ROW S scale() const { return S((coefficient * mass + target_coefficient) / own.sum); }
  // The part of a class that is hidden from the sweeps.
  KD_ROW S missing(S z) const {
    const S e = z > floor_of<S> ? S(__builtin_exp((double)z - own.max)) : S(0);
    return e * scale();
  }
};
