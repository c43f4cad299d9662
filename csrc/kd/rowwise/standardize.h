// SPDX-License-Identifier: Apache-2.0
// Standardised rows: the mean and deviation of their finite classes.

constexpr double standard_eps = 1e-7;  // added to the deviation; STANDARD_EPS in kdkernels/divergences.py

// A guess of the mean, from the first few finite classes; exact where the row is constant.
template <class S>
KD_ROW S near_mean(const Side<S>& side, int64_t classes) {
  double first = 0, total = 0;
  int count = 0;
  for (int64_t i = 0; i < classes && count < 8; i++) {
    const double z = side.at(i);
    if (!(z > floor_of<S>)) continue;
    if (count++ == 0) first = z;
    total += z - first;
  }
  return S(count ? first + total / count : 0);
}

// Mean and deviation of both sides, in one sweep unless a guess was far off.
template <class S>
KD_ROW void describe(Row<S>& r) {
  Moments s{near_mean(r.student, r.classes)}, t{near_mean(r.teacher, r.classes)};
  add_moments(r, s, t);
  if (s.cancel() || t.cancel()) {
    s = {S(s.mean())}, t = {S(t.mean())};
    add_moments(r, s, t);
  }
  const auto set = [](Side<S>& side, const Moments& m) {
    const double std = m.deviation();
    side.mean = m.mean(), side.std = std;
    side.spread = std > 0 ? 1 / ((standard_eps + std) * (m.count - 1) * std) : 0;
  };
  set(r.student, s), set(r.teacher, t);
}
