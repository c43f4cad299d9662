// SPDX-License-Identifier: Apache-2.0
// A row of the rowwise family while it is being worked on. What is said of it once, by a few numbers,
// is in this folder, and what is done to every class of it is a kernel's own, declared below. Included
// inside a kernel's namespace, after its `RowReader`, and
//
//   Side<S>       one side's logits of the divergence's classes, in `reader`: at(class); `patched`, a
//                 class that is read as `patch`; and of standardised rows mean, std and spread
//   Workspace<S>  whatever its sweeps keep from one to the next
//   has_nothing   whether it has the paths of paths.h that stand for no divergence; otherwise those
//                 rows take the divergence's, times 0
//   KD_ROW        before its functions over a row

constexpr float exact_range = 60;

// What the sweeps read of a row; they take a copy, which no store can alias.
template <class S>
struct Scalars {
  S inv_ts, inv_tt, rate_s, rate_t;  // 1 / temperature, and as exp_at_rate takes it
  S max_s, max_t;
  bool subtract_first;  // see log_ratio
  S delta, inv_sum_s, inv_sum_t, log_sum_s, log_sum_t;
  S log_mixed;  // RenyiFar only: log sum p_t^alpha p_s^(1 - alpha)
  Shape<S> shape;
};

template <class S>
KD_ROW RowReader<S> student_of(const RowwiseParams& p, int64_t row) {
  return {p.student, row_offset(p.student, row) + p.first * p.student.class_stride};
}
template <class S>
KD_ROW RowReader<S> teacher_of(const RowwiseParams& p, int64_t row) {
  if (!looks_at_teacher(p)) return student_of<S>(p, row);
  return {p.teacher, row_offset(p.teacher, row) + p.teacher_first * p.teacher.class_stride};
}

template <class S>
struct Row : Workspace<S> {
  const RowwiseParams& p;
  double factor;           // of the reduction
  int64_t index, classes;  // of the divergence
  int64_t target = -1;     // among them
  Side<S> student, teacher;
  Scalars<S> k;
  // measured
  S lowest, highest;            // of u_t - u_s
  double sum_s, sum_t, excess;  // S; sum exp(u_t); A
  double plain_s, plain_t;      // sum exp(z - max) at temperature 1, where it is wanted
  // A gradient is du times its factor, where du = share (p df/dp - p centre) - p shift; and the
  // target's own where it is hidden from the sweeps.
  double share = 1, shift_s = 0, shift_t = 0;
  bool infinite = false;     // what the target has of its own is
  double teacher_ratio = 1;  // of the target's logit as it is read
  // reduced: f, p_s df/dp_s, p_t df/dp_t; sums of du (z - max), for temperatures and deviations,
  // and of p (z - max)
  double value = 0, centre_s = 0, centre_t = 0, slope_s = 0, slope_t = 0, tilt_s = 0, tilt_t = 0;

  template <class... A>
  KD_ROW Row(const RowwiseParams& p, int64_t i, double factor, A&... workspace)
      : Workspace<S>(workspace...), p(p), factor(factor), index(i),
        classes(p.width ? p.width : p.classes),
        student(student_of<S>(p, i), classes), teacher(teacher_of<S>(p, i), classes) {
    k.shape = {S(p.alpha), S(p.beta)};
    if (p.target != Target::ordinary) target = p.targets[i] - p.first;
  }
  KD_ROW bool target_known() const { return target >= 0 && target < classes; }
  // What slopes are taken about. du sums to 0, so that it matters to the rounding alone.
  KD_ROW S origin_s() const { return p.standardize ? S(student.mean) : k.max_s; }
  KD_ROW S origin_t() const { return p.standardize ? S(teacher.mean) : k.max_t; }
  KD_ROW bool target_hidden() const { return student.patched >= 0; }
  // What a hidden target has in the slopes, about the others' `tilt`.
  KD_ROW void add_target_slopes(double tilt_s, double tilt_t) {
    if (shift_s != 0) slope_s += shift_s * ((double)student.at(target) - origin_s() - tilt_s);
    if (shift_t != 0) slope_t += shift_t * ((double)teacher.at(target) - origin_t() - tilt_t);
  }
  KD_ROW void temper(double tau_s, double tau_t) {
    k.inv_ts = S(1 / tau_s), k.inv_tt = S(1 / tau_t);
    k.rate_s = exp_rate<S>(1 / tau_s), k.rate_t = exp_rate<S>(1 / tau_t);
  }
};

// u_t - u_s; near 0 for a class that is off on both sides, which where all are `finite` none is.
// Rows with close maxima and one temperature are subtracted first: exact where the logits are close.
// With an offset between them that would round to the offset's precision, so each is then centred
// first.
template <bool finite = false, class V, class S>
KD_FN V log_ratio(const Scalars<S>& k, V s, V t) {
  if (k.subtract_first) return ((t - s) - (k.max_t - k.max_s)) * k.inv_ts;
  const V d = (t - k.max_t) * k.inv_tt - (s - k.max_s) * k.inv_ts;
  if constexpr (finite) return d;
  return select(s + t <= all<V>(2 * floor_of<S>), V{}, d);
}

// What a row has at temperature 1, over all its classes.
template <class S>
struct Normaliser {
  S max = 0;
  double sum = 0;  // of exp(z - max)

  KD_ROW double log_prob(S z) const {
    return z > floor_of<S> ? (double)z - max - __builtin_log(sum) : -__builtin_inf();
  }
};

// What the gradients are multiplied by, per du of either side; and, of standardised rows, what
// their deviation takes away per distance from the mean.
struct Scaling {
  double student, teacher, spread_s = 0, spread_t = 0;
};

// Of a standardised row, from the distances of its classes to `centre`.
struct Moments {
  double centre, count = 0, total = 0, squares = 0;

  KD_ROW double mean() const { return count > 0 ? centre + total / count : 0; }
  KD_ROW double deviation() const {  // unbiased
    if (!(count > 1)) return 0;
    const double about_mean = squares - total * total / count;
    return about_mean < 0 ? 0 : __builtin_sqrt(about_mean / (count - 1));
  }
  KD_ROW bool cancel() const { return total * total > squares * count / 2; }
};

template <class S> struct CrossEntropyRow;

// The maxima and sums of a row; `plain`: how many of those at temperature 1 are wanted, the
// student's first.
template <class S> KD_ROW void measure(Row<S>& r, int plain);
// The loss, and the sums that centre the gradients.
template <class C, class S> KD_ROW void reduce(Row<S>& r);
KD_ROW void reduce_renyi_far(Row<double>& r);
// The gradients. `alone`: the student's, with the loss.
template <class C, bool alone, class S>
KD_ROW void emit(Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling);
// Adds what is to know of both sides' finite classes.
template <class S> KD_ROW void add_moments(Row<S>& r, Moments& student, Moments& teacher);
// Of a whole row, where the divergence is over a window of it.
template <class S>
KD_ROW Normaliser<S> normaliser_of(const Row<S>& r, const RowReader<S>& reader, int64_t classes);
// Adds to the sums of y, of y (z - max), and of y where z is -inf, what is not one class's:
// probabilities, and the smoothing.
template <class S>
KD_ROW void sum_targets(const CrossEntropyRow<S>& ce, double& mass_y, double& dot, double& off);
