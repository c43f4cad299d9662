// SPDX-License-Identifier: Apache-2.0
// Losses that are a sum over elements, per element: included by every kernel, inside its own
// namespace and after its KD_FN, `all`, `select`, `at_least` and `at_most`. V is a float, a double or
// a vector of them.
//
// `terms` gives the value and its derivatives to the student, the teacher and the parameter: a
// number per channel, or a mask. All are half of a square, so that a derivative is no larger than a
// difference of two elements, which fp16 holds. NaN stays NaN: a gate multiplies what it shuts out.
//
// To add one: a struct here, its line in KD_ELEMENTS, its kind in maps.h.

template <class V>
struct Element {
  V value, student, teacher, parameter;
};

struct Square {  // c (s - t)^2 / 2
  template <class S>
  static KD_FN S absent() { return S(1); }
  template <class V, class S>
  static KD_FN Element<V> terms(V s, V t, V c, S) {
    const V e = s - t, ce = c * e, half = S(0.5) * e;
    return {half * ce, ce, -ce, half * e};
  }
};

struct OFD {  // (s - max(t, c))^2 / 2 where s or t is above: s > max(t, c), or max(t, c) > 0
  template <class S>
  static KD_FN S absent() { return S(-__builtin_inf()); }
  template <class V, class S>
  static KD_FN Element<V> terms(V s, V t, V c, S) {
    const V zero = all<V>(S(0)), one = all<V>(S(1));
    const V target = at_least(t, c);
    const V e = (s - target) * select((s > target) | (target > zero), one, zero);
    const V above = select(t > c, one, zero);
    return {S(0.5) * e * e, e, -above * e, (above - S(1)) * e};
  }
};

struct AB {  // max(s + m, 0)^2 / 2 where t <= 0, min(s - m, 0)^2 / 2 where t > 0
  template <class S>
  static KD_FN S absent() { return S(0); }
  template <class V, class S>
  static KD_FN Element<V> terms(V s, V t, V, S m) {
    const V zero = all<V>(S(0));
    const V e = select(t > zero, at_most(s - m, zero), at_least(s + m, zero));
    return {S(0.5) * e * e, e, zero, zero};
  }
};

#define KD_ELEMENTS(X) X(square, Square) X(ofd, OFD) X(ab, AB)
