// SPDX-License-Identifier: Apache-2.0
// The second step: the tail's sum of exponentials, which are kept, since the gradient of a class in
// the tail is a multiple of its exponential.

// How far above `top`, over the temperature, exponentials may lie. With this much room the logits of
// a row's first vector nearly always serve for all of it: no sweep for the maximum, and one factor
// for all exponentials. Where they do not, the block starts over with its own maximum.
constexpr double headroom = 16;

// Which of the classes from i on are stored, a bit for each lane.
template <class V>
KD_FN unsigned stored_lanes(const uint8_t* stored, int i) {
  uint16_t bits;
  __builtin_memcpy(&bits, stored + i / 8, 2);
  return Lanes<V>::count < 8 ? bits >> (i & 7) : bits;
}

template <bool slopes, class S>
void measure(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  const S rate = exp_rate<S>(1 / r.tau_s), room = S(headroom * r.tau_s);
  alignas(64) S buffer[block], unkept[block];
  for_blocks(r.p.classes, [&](int64_t first, int n) {
    const S* z = r.student.get(first, n, buffer);
    const uint8_t* stored = r.w.stored + first / 8;
    S* out = r.kept ? r.kept + first : unkept;
    const auto tail = [&](int i, auto w) {
      const V logits = without(read<V>(z + i, w, floor_of<S>), stored_lanes<V>(stored, i), floor_of<S>);
      return at_least(logits, all<V>(floor_of<S>));
    };
    V total, slope;
    const auto exponentials = [&](S top) {
      V high = all<V>(top);
      total = slope = V{};
      sweep<V>(n, [&](int i, auto w) {
        const V logits = tail(i, w), x = logits - top, e = exp_at_rate(x, rate);
        high = at_least(logits, high);
        total += e;
        if (slopes) slope += e * x;
        write<V>(out + i, w, e);
      });
      return largest(high);
    };
    if (first == 0)
      r.top = n < Lanes<V>::count ? largest(tail(0, Part{n})) : largest(tail(0, Whole{}));
    const S high = exponentials(r.top);
    if (high - r.top > room) {
      const double fall = (double)r.top - high, scale = __builtin_exp(fall / r.tau_s);
      r.slope = scale * (r.slope + r.sum * fall), r.sum *= scale, r.top = high;
      exponentials(high);
    }
    r.sum += sum(total), r.slope += sum(slope);
    r.w.top[first / block] = r.top;
  });
}
