// SPDX-License-Identifier: Apache-2.0
// Standardised rows: the mean and deviation of their finite classes, and the gradient through them.

constexpr double standard_eps = 1e-7;  // added to the deviation; STANDARD_EPS in kdkernels/divergences.py

// Of the classes' distances from `centre`.
struct Moments {
  double centre, count = 0, total = 0, squares = 0;

  double mean() const { return count > 0 ? centre + total / count : 0; }
  double deviation() const {  // unbiased
    if (!(count > 1)) return 0;
    const double about_mean = squares - total * total / count;
    return about_mean < 0 ? 0 : __builtin_sqrt(about_mean / (count - 1));
  }
  bool cancel() const { return total * total > squares * count / 2; }
};

template <class V>
struct MomentLanes {
  V count{}, total{}, squares{};

  template <class S>
  KD_FN void add(V z, S centre) {
    const auto off = z <= all<V>(floor_of<S>);
    const V distance = select(off, V{}, z - centre);
    count += select(off, V{}, all<V>(S(1)));
    total += distance, squares += distance * distance;
  }
  void add_to(Moments& m) const {
    m.count += sum(count), m.total += sum(total), m.squares += sum(squares);
  }
};

// A guess of the mean, from the first few finite classes; exact where the row is constant.
template <class S>
S near_mean(const Side<S>& side, int64_t classes) {
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
void describe(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  Moments s{near_mean(r.student, r.classes)}, t{near_mean(r.teacher, r.classes)};
  for (bool again = false;; again = true) {
    for_blocks(r.classes, [&](int64_t first, int n) {
      const S* z_s = r.student.get(first, n);
      const S* z_t = r.teacher.get(first, n);
      const S centre_s = S(s.centre), centre_t = S(t.centre);
      MomentLanes<V> lanes_s, lanes_t;
      sweep<V>(n, [&](int i, auto w) {
        lanes_s.add(read<V>(z_s + i, w, floor_of<S>), centre_s);
        lanes_t.add(read<V>(z_t + i, w, floor_of<S>), centre_t);
      });
      lanes_s.add_to(s), lanes_t.add_to(t);
    });
    if (again || !(s.cancel() || t.cancel())) break;
    s = {S(s.mean())}, t = {S(t.mean())};
  }
  const auto set = [](Side<S>& side, const Moments& m) {
    const double std = m.deviation();
    side.mean = m.mean(), side.std = std;
    side.spread = std > 0 ? 1 / ((standard_eps + std) * (m.count - 1) * std) : 0;
  };
  set(r.student, s), set(r.teacher, t);
}

// Takes from the gradient what reaches the logits `z` through their deviation.
template <class S>
void through_deviation(const Side<S>& side, double spread, int n, const S* z, S* grad) {
  using V = typename VectorOf<S>::V;
  const S mean = S(side.mean), rate = S(spread);
  sweep<V>(n, [&](int i, auto w) {
    const V x = read<V>(z + i, w, floor_of<S>);
    const V away = select(x > all<V>(floor_of<S>), (x - mean) * rate, V{});
    write<V>(grad + i, w, read<V>(grad + i, w, S(0)) - away);
  });
}
