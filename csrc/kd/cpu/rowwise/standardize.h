// SPDX-License-Identifier: Apache-2.0
// What standardised rows need of their classes, and the gradient through their deviation.

// Sums over a block, about the centre that is also read past its end.
template <class V>
struct MomentLanes {
  V off{}, total{}, squares{};

  // The distance to the centre, 0 for a class that is off.
  template <class W, class S>
  KD_FN V add(W, V z, S centre) {
    V distance = z - centre;
    if constexpr (!__is_same(W, Finite)) {
      const auto is_off = z <= all<V>(floor_of<S>);
      off += select(is_off, all<V>(S(1)), V{}), distance = select(is_off, V{}, distance);
    }
    total += distance, squares += distance * distance;
    return distance;
  }
  void add_to(Moments& m, int n) const {
    m.count += n - sum(off), m.total += sum(total), m.squares += sum(squares);
  }
};

// And the maxima, up to their rounding, where no class is off and no target still to be placed.
template <class S>
void add_moments(Row<S>& r, Moments& s, Moments& t) {
  using V = typename VectorOf<S>::V;
  const S centre_s = S(s.centre), centre_t = S(t.centre);
  V high_s{}, high_t{}, low{};
  r.ranged = r.finite = r.p.target == Target::ordinary;
  for_blocks(r.classes, [&](int64_t first, int n) {
    const S* z_s = r.student.get(first, n);
    const S* z_t = r.teacher.get(first, n);
    MomentLanes<V> lanes_s, lanes_t;
    const auto add = [&](int i, auto w) {
      const V zs = read<V>(z_s + i, w, centre_s), zt = read<V>(z_t + i, w, centre_t);
      const V ds = lanes_s.add(w, zs, centre_s), dt = lanes_t.add(w, zt, centre_t);
      high_s = at_least(ds, high_s), high_t = at_least(dt, high_t);
      low = at_most(dt, at_most(ds, low));
    };
    sweep<V, Finite>(n, add);
    if (!(largest(-low) < -floor_of<S>)) {
      r.ranged = false;
      lanes_s = lanes_t = {};
      sweep<V>(n, add);
    }
    lanes_s.add_to(s, n), lanes_t.add_to(t, n);
  });
  r.k.max_s = centre_s + largest(high_s), r.k.max_t = centre_t + largest(high_t);
  if (r.p.target != Target::ordinary)
    r.student.read = r.teacher.read = nullptr;  // without the target's place
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
