// SPDX-License-Identifier: Apache-2.0
// Elementary functions that keep their relative accuracy near 0, of a float, a double or a vector of
// them. Included by every kernel, inside its own namespace and after its KD_FN, `Lanes`, `all`,
// `select`, `at_least`, `at_most`, `magnitude`, `shifted_left` of bits, whatever their sign, and the
// casts `as_integer`, `as_number` and `to_number`.

// Constants of the two formats, which Lanes<V> has.
struct Single {
  using S = float;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int32_t magnitude = 0x7fffffff, mantissa_mask = 0x007fffff, one = 0x3f800000;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  static constexpr S round = 12582912.f, ln2_hi = 0.693145752f, ln2_lo = 1.42860677e-6f;
  static constexpr S lowest_exp = -88, highest_exp = 88;
};
struct Double {
  using S = double;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int64_t magnitude = 0x7fffffffffffffff, mantissa_mask = 0x000fffffffffffff,
                           one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr S round = 6755399441055744., ln2_hi = 0.693147180369123816490,
                     ln2_lo = 1.90821492927058770002e-10;
  static constexpr S lowest_exp = -709, highest_exp = 709;
};

// q with expm1(f) = f + f^2 q(f): relative error under 1.5e-7 for a float that is_near, and under one
// unit in the last place for a double, |f| <= ln(2) / 2.
template <class V>
KD_FN V expm1_tail(V f) {
  if constexpr (sizeof(typename Lanes<V>::S) == 4) {
    V q = all<V>(1.9883886853e-4f);
    q = q * f + 1.4035037020e-3f;
    q = q * f + 8.3337193355e-3f;
    q = q * f + 4.1664764285e-2f;
    q = q * f + 1.6666661203e-1f;
    return q * f + 0.5f;
  } else {
    V q = all<V>(1. / 6227020800.);
    q = q * f + 1. / 479001600.;
    q = q * f + 1. / 39916800.;
    q = q * f + 1. / 3628800.;
    q = q * f + 1. / 362880.;
    q = q * f + 1. / 40320.;
    q = q * f + 1. / 5040.;
    q = q * f + 1. / 720.;
    q = q * f + 1. / 120.;
    q = q * f + 1. / 24.;
    q = q * f + 1. / 6.;
    return q * f + 0.5;
  }
}

// Where a class's terms are had from that series, since from exp(x) they would cancel. At a float's
// 0.65 a KL's term, x^2 / 2 in the main, still takes exp's error 7-fold, at 0.34 20-fold.
template <class V>
KD_FN auto is_near(V x) {
  return magnitude(x) < all<V>(sizeof(typename Lanes<V>::S) == 4 ? 0.65 : 0.34);
}

// expm1(x) of floats that are small, where expm1(x) - x is not looked at: a coefficient less will do.
template <class V>
KD_FN V expm1_small(V x) {
  V q = all<V>(1.3940639e-3f);
  q = q * x + 8.3629042e-3f;
  q = q * x + 4.1666381e-2f;
  q = q * x + 1.6666579e-1f;
  return x + x * x * (q * x + 0.5f);
}
template <class V>
KD_FN auto is_small(V x) {
  return magnitude(x) < all<V>(0.34f);
}

// x = n ln 2 + f; 2^n; f^2 q(f).
template <class V>
struct Reduced {
  V f, power, square;
  decltype(V{} == V{}) near;  // n = 0
};
template <class V>
KD_FN Reduced<V> reduce(V x) {
  using L = Lanes<V>;
  x = at_most(at_least(x, all<V>(L::lowest_exp)), all<V>(L::highest_exp));
  const V shifted = x * (typename L::S)1.44269504088896341 + L::round;
  const V n = shifted - L::round;
  const V f = (x - n * L::ln2_hi) - n * L::ln2_lo;
  // The low bits of `shifted` are n; at the lowest x, 2^n is 0: exp is exactly 0, expm1 -1.
  const V power = as_number<V>(shifted_left(as_integer(shifted), L::mantissa) + L::one);
  return {f, power, f * f * expm1_tail(f), n == all<V>(0)};
}
// exp(x), expm1(x) and expm1(x) - x, none with cancellation.
template <class V>
struct Exp {
  V value, minus_one, excess;
};
template <class V>
KD_FN Exp<V> exp_parts(V x) {
  const Reduced<V> r = reduce(x);
  const V growth = r.power * (r.f + r.square);
  const V minus_one = growth + (r.power - (typename Lanes<V>::S)1);
  return {growth + r.power, minus_one, select(r.near, r.square, minus_one - x)};
}
// What exp_at_rate, each level's own, multiplies by to take exp(x / c) for the inverse of c.
template <class S>
KD_FN S exp_rate(double inverse) {
  return S(sizeof(S) == 4 ? inverse * 1.44269504088896341 : inverse);
}

template <class V>
KD_FN V exp(V x) {
  return exp_parts(x).value;
}

// sum_{k>=1} 2 s^(2k+1) / (2k+1), over s, of log((1 + s) / (1 - s)) - 2 s.
template <class V>
KD_FN V log_tail(V s2) {
  if constexpr (sizeof(typename Lanes<V>::S) == 4) {
    V r = all<V>(2.f / 11);
    r = r * s2 + 2.f / 9;
    r = r * s2 + 2.f / 7;
    r = r * s2 + 2.f / 5;
    return (r * s2 + 2.f / 3) * s2;
  } else {
    V r = all<V>(2. / 21);
    r = r * s2 + 2. / 19;
    r = r * s2 + 2. / 17;
    r = r * s2 + 2. / 15;
    r = r * s2 + 2. / 13;
    r = r * s2 + 2. / 11;
    r = r * s2 + 2. / 9;
    r = r * s2 + 2. / 7;
    r = r * s2 + 2. / 5;
    return (r * s2 + 2. / 3) * s2;
  }
}
// log(u), and x - log(u) without cancellation, for a normal u > 0 of which x is u - 1, exact near 0.
template <class V>
struct Log1p {
  V value, excess;
};
template <class V>
KD_FN Log1p<V> log_parts(V u, V x) {
  using L = Lanes<V>;
  using I = typename L::I;
  using S = typename L::S;
  const I bits = as_integer(u) + (L::one - L::sqrt_half);
  const I k = (bits >> L::mantissa) - L::bias;
  const V n = to_number<V>(k);
  const V m = as_number<V>((bits & L::mantissa_mask) + L::sqrt_half);
  const auto near = k == 0;
  const V z = select(near, x, m - S(1));
  const V s = z / (S(2) + z);
  const V drop = s * (z - log_tail(s * s));  // z - log(1 + z)
  const V value = n * L::ln2_hi + ((z - drop) + n * L::ln2_lo);
  return {value, select(near, drop, x - value)};
}
// log(1 + x), and x - log(1 + x); x > -1, or -1 for a large negative value.
template <class V>
KD_FN Log1p<V> log1p_parts(V x) {
  using S = typename Lanes<V>::S;
  return log_parts(at_least(S(1) + x, all<V>(S(1e-30))), x);
}

// -inf as a number: its exp is 0. Rows with fp32 numbers below theirs are for the double path.
template <class S> constexpr S floor_of = sizeof(S) == 4 ? S(-1e30) : S(-1e300);
constexpr double beyond = 1e300;  // a sum that has overflowed, or would
