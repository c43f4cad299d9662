// SPDX-License-Identifier: Apache-2.0
// What standardised rows need of their classes, and the gradient through their deviation.

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

template <class S>
void add_moments(Row<S>& r, Moments& s, Moments& t) {
  using V = typename VectorOf<S>::V;
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
