// SPDX-License-Identifier: Apache-2.0
// What a loss does with a row's target class: a few scalars per row, in double. The sweeps see the
// target as a class that is off (decoupled, separate) or at another temperature (tempered).

// Added to the teacher's cross-entropy, by which WSLD divides. WEIGHTING_EPS in kdkernels/divergences.py.
constexpr double weighting_eps = 1e-7;

// DKD's part of the target, KL between (b, 1 - b) of teacher and student.
struct Decoupled {
  double value = 0, slope_s = 0, slope_t = 0;  // and d/dx of either side's log-odds
};

// x: log-odds of either side; d: x_t - x_s, where these are finite.
static KD_ROW Decoupled decoupled(double x_s, double x_t, double d) {
  const auto sigmoid = [](double x) {
    const double e = __builtin_exp(-__builtin_fabs(x));
    return (x < 0 ? e : 1) / (1 + e);
  };
  const auto log_sigmoid = [](double x) {
    return (x < 0 ? x : 0) - __builtin_log1p(__builtin_exp(-__builtin_fabs(x)));
  };
  const double b_s = sigmoid(x_s), b_t = sigmoid(x_t);
  if (__builtin_fabs(d) <= 1) {
    // With m = b_t / (1 - b_t) over b_s / (1 - b_s), less 1: nothing cancels.
    const double m = __builtin_expm1(d), w = __builtin_log1p(b_s * m), c_s = sigmoid(-x_s);
    const double e_1 = c_s * m / (1 + b_s * m), e_0 = -b_s * m / (1 + b_s * m);
    const auto phi = [](double e, double log1p_e) {  // (1 + e) log(1 + e) - e
      const double series =
          e * e * (1. / 2 - e * (1. / 6 - e * (1. / 12 - e * (1. / 20 - e * (1. / 30 - e / 42)))));
      return __builtin_fabs(e) < 1e-3 ? series : (1 + e) * log1p_e - e;
    };
    return {b_s * phi(e_1, d - w) + c_s * phi(e_0, -w), -b_s * e_1, b_t * sigmoid(-x_t) * d};
  }
  const double c_s = sigmoid(-x_s), c_t = sigmoid(-x_t);
  const double one = b_t > 0 ? b_t * (log_sigmoid(x_t) - log_sigmoid(x_s)) : 0;
  const double zero = c_t > 0 ? c_t * (log_sigmoid(-x_t) - log_sigmoid(-x_s)) : 0;
  const bool moves = b_t > 0 && c_t > 0 && one + zero < beyond;
  return {one + zero, x_s > 0 ? c_t - c_s : b_s - b_t, moves ? b_t * c_t * d : 0};
}

// Hides the target from the sweeps, or gives it the temperature it has.
template <class S>
KD_ROW void place_target(Row<S>& r, double tau_t) {
  const RowwiseParams& p = r.p;
  if (!r.target_known()) return;
  if (p.target == Target::decoupled || p.target == Target::separate) {
    r.student.patched = r.teacher.patched = r.target;
    r.student.patch = r.teacher.patch = floor_of<S>;
  } else if (p.target == Target::tempered) {
    r.teacher.patched = r.target;
    r.teacher_ratio = tau_t / p.target_temperature;
    const S z = r.teacher.at(r.target);
    r.teacher.patch = z > floor_of<S> || z != z ? S(z * r.teacher_ratio) : floor_of<S>;
  }
}

// The normaliser at temperature 1 of a row that was measured with its target hidden or not.
template <class S>
KD_ROW Normaliser<S> with_target(const Row<S>& r, const Side<S>& side, S max, double plain) {
  if (side.patched < 0 || r.p.target == Target::tempered) return {max, plain};
  const double z = side.at(side.patched);
  if (z != z) return {S(z), z};
  if (!(z > floor_of<S>)) return {max, max > floor_of<S> ? plain : 0};
  if (!(max > floor_of<S>)) return {S(z), 1};
  if (z <= max) return {max, plain + __builtin_exp(z - max)};
  return {S(z), plain * __builtin_exp(max - z) + 1};
}

// The log-odds of the target against the others, of which the row was measured.
template <class S>
KD_ROW Decoupled decoupled_of(Row<S>& r, bool others_s, bool others_t) {
  const double z_s = r.student.at(r.target), z_t = r.teacher.at(r.target);
  const double infinity = __builtin_inf();
  const auto odds = [&](double z, bool others, double max, double inverse, double sum) {
    if (!(z > floor_of<S>)) return z != z ? z : others ? -infinity : __builtin_nan("");
    if (z > beyond) return __builtin_nan("");
    return others ? (z - max) * inverse - __builtin_log(sum) : infinity;
  };
  const double x_s = odds(z_s, others_s, r.k.max_s, r.k.inv_ts, r.sum_s);
  const double x_t = odds(z_t, others_t, r.k.max_t, r.k.inv_tt, r.sum_t);
  double d = x_t - x_s;
  if (x_s == x_t) d = x_s - x_s == 0 ? d : 0;  // both certain
  if (d - d == 0 && others_s && others_t && z_s > floor_of<S> && z_t > floor_of<S>) {
    const double centred = r.k.subtract_first
                               ? ((z_t - z_s) - ((double)r.k.max_t - r.k.max_s)) * r.k.inv_ts
                               : (z_t - r.k.max_t) * r.k.inv_tt - (z_s - r.k.max_s) * r.k.inv_ts;
    d = centred - r.k.delta;
  }
  if (x_s != x_s || x_t != x_t) return {x_s + x_t};
  return decoupled(x_s, x_t, d);
}

// The teacher's temperature does not move a target that has its own.
template <class S>
KD_ROW void temper_slope(Row<S>& r) {
  const double s = r.student.at(r.target), t = r.teacher.patch;
  if (!(t > floor_of<S>) || r.slope_t == 0) return;
  const double q = __builtin_exp((t - r.k.max_t) * r.k.inv_tt) / r.sum_t;
  const double log_p = (s - r.k.max_s) * r.k.inv_ts - __builtin_log(r.sum_s);
  r.slope_t -= r.share * q * (-log_p - r.centre_t) * t;
}

// What the gradients' sweep could not say of the target.
template <class S>
KD_ROW void emit_target(const Row<S>& r, const CrossEntropyRow<S>& ce, Scaling scaling, S& grad_s,
                 S& grad_t) {
  if (r.p.target == Target::tempered && r.p.grad_teacher.data) grad_t *= S(r.teacher_ratio);
  if (!r.target_hidden()) return;
  const auto own = [](const Side<S>& side, S z, double du, double factor, double spread) {
    return S(du * factor - (z > floor_of<S> ? (z - side.mean) * spread : 0));
  };
  const S z_s = r.student.at(r.target), z_t = r.teacher.at(r.target);
  grad_s = own(r.student, z_s, r.shift_s, scaling.student, scaling.spread_s);
  grad_t = own(r.teacher, z_t, r.shift_t, scaling.teacher, scaling.spread_t);
  if (ce.wanted) grad_s += ce.missing(z_s);
}
