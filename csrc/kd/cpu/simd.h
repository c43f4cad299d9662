// SPDX-License-Identifier: Apache-2.0
// Vectors of one ISA level and their elementary functions. Included inside the level's namespace,
// with KD_BYTES its vector width. GCC's vector extensions carry the arithmetic; only loads and
// stores of part of a vector differ by level. No standard-library templates here: the linker could
// keep a copy compiled for AVX-512 and hand it to every caller.
#define KD_FN inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(KD_BYTES)));
typedef double vd __attribute__((vector_size(KD_BYTES)));
typedef int32_t vi __attribute__((vector_size(KD_BYTES)));
typedef int64_t vl __attribute__((vector_size(KD_BYTES)));

template <class V> struct Lanes;
template <> struct Lanes<vf> {
  using S = float;
  using I = vi;
  static constexpr int count = KD_BYTES / 4, mantissa = 23, bias = 127;
  static constexpr int32_t magnitude = 0x7fffffff, mantissa_mask = 0x007fffff, one = 0x3f800000;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  static constexpr S round = 12582912.f, ln2_hi = 0.693145752f, ln2_lo = 1.42860677e-6f;
  static constexpr S lowest_exp = -88, highest_exp = 88;
};
template <> struct Lanes<vd> {
  using S = double;
  using I = vl;
  static constexpr int count = KD_BYTES / 8, mantissa = 52, bias = 1023;
  static constexpr int64_t magnitude = 0x7fffffffffffffff, mantissa_mask = 0x000fffffffffffff,
                           one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr S round = 6755399441055744., ln2_hi = 0.693147180369123816490,
                     ln2_lo = 1.90821492927058770002e-10;
  static constexpr S lowest_exp = -709, highest_exp = 709;
};
template <class S> struct VectorOf;
template <> struct VectorOf<float> { using V = vf; };
template <> struct VectorOf<double> { using V = vd; };

template <class V, class S>
KD_FN V all(S x) {
  return V{} + (typename Lanes<V>::S)x;
}
template <class V, class M>
KD_FN V select(M mask, V yes, V no) {
  return mask ? yes : no;
}
// The larger and the smaller; NaN in `x` stays. Spelled out, since from a comparison the compiler
// makes two instructions.
template <class V>
KD_FN V at_least(V x, V low) {
  return low > x ? low : x;
}
template <class V>
KD_FN V at_most(V x, V high) {
  return high < x ? high : x;
}
#if KD_BYTES == 64
KD_FN vf at_least(vf x, vf low) { return (vf)_mm512_max_ps((__m512)low, (__m512)x); }
KD_FN vd at_least(vd x, vd low) { return (vd)_mm512_max_pd((__m512d)low, (__m512d)x); }
KD_FN vf at_most(vf x, vf high) { return (vf)_mm512_min_ps((__m512)high, (__m512)x); }
KD_FN vd at_most(vd x, vd high) { return (vd)_mm512_min_pd((__m512d)high, (__m512d)x); }
#elif KD_BYTES == 32
KD_FN vf at_least(vf x, vf low) { return (vf)_mm256_max_ps((__m256)low, (__m256)x); }
KD_FN vf at_most(vf x, vf high) { return (vf)_mm256_min_ps((__m256)high, (__m256)x); }
#endif

// The square root.
KD_FN double root(double x) { return __builtin_sqrt(x); }
#if KD_BYTES == 64
KD_FN vd root(vd x) { return (vd)_mm512_sqrt_pd((__m512d)x); }
#elif KD_BYTES == 32
KD_FN vd root(vd x) { return (vd)_mm256_sqrt_pd((__m256d)x); }
#else
KD_FN vd root(vd x) {
  for (int i = 0; i < Lanes<vd>::count; i++) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

// Over the lanes, always in the same order.
#if KD_BYTES == 64
KD_FN float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
KD_FN double sum(vd v) { return _mm512_reduce_add_pd((__m512d)v); }
KD_FN float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
KD_FN double largest(vd v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
template <class V>
KD_FN typename Lanes<V>::S sum(V v) {
  for (int half = Lanes<V>::count / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}
template <class V>
KD_FN typename Lanes<V>::S largest(V v) {
  for (int half = Lanes<V>::count / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}
#endif

template <class V>
KD_FN V load(const typename Lanes<V>::S* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
KD_FN void store(typename Lanes<V>::S* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n lanes; the others are `fill`, and are not stored.
#if KD_BYTES == 64
KD_FN vf load(const float* p, int n, float fill) {
  return (vf)_mm512_mask_loadu_ps((__m512)all<vf>(fill), (__mmask16)((1u << n) - 1), p);
}
KD_FN vd load(const double* p, int n, double fill) {
  return (vd)_mm512_mask_loadu_pd((__m512d)all<vd>(fill), (__mmask8)((1u << n) - 1), p);
}
KD_FN void store(float* p, int n, vf v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
KD_FN void store(double* p, int n, vd v) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#else
template <class S, class V = typename VectorOf<S>::V>
KD_FN V load(const S* p, int n, S fill) {
  V v = all<V>(fill);
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
template <class V, class S = typename Lanes<V>::S>
KD_FN void store(S* p, int n, V v) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
#endif

// `v` with `fill` in the lanes whose bits are set.
#if KD_BYTES == 64
KD_FN vf without(vf v, unsigned bits, float fill) {
  return (vf)_mm512_mask_mov_ps((__m512)v, (__mmask16)bits, (__m512)all<vf>(fill));
}
KD_FN vd without(vd v, unsigned bits, double fill) {
  return (vd)_mm512_mask_mov_pd((__m512d)v, (__mmask8)bits, (__m512d)all<vd>(fill));
}
#else
template <class V, class S = typename Lanes<V>::S>
KD_FN V without(V v, unsigned bits, S fill) {
  typename Lanes<V>::I lane;
  for (int i = 0; i < Lanes<V>::count; i++) lane[i] = 1 << i;
  return select((lane & bits) != 0, all<V>(fill), v);
}
#endif

// q with expm1(f) = f + f^2 q(f), |f| <= ln(2) / 2: relative error under one unit in the last place.
KD_FN vf expm1_tail(vf f) {
  vf q = all<vf>(1.9875691500e-4f);
  q = q * f + 1.3981999507e-3f;
  q = q * f + 8.3334519073e-3f;
  q = q * f + 4.1665795894e-2f;
  q = q * f + 1.6666665459e-1f;
  return q * f + 5.0000001201e-1f;
}
KD_FN vd expm1_tail(vd f) {
  vd q = all<vd>(1. / 6227020800.);
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

template <class V>
KD_FN V magnitude(V x) {
  return (V)((typename Lanes<V>::I)x & Lanes<V>::magnitude);
}
// Where expm1(x) may be had from its series, x + x^2 expm1_tail(x).
template <class V>
KD_FN auto is_near(V x) {
  return magnitude(x) < all<V>(0.34);
}

// x = n ln 2 + f; 2^n; f^2 q(f).
template <class V>
struct Reduced {
  V f, power, square;
  typename Lanes<V>::I near;  // n = 0
};
template <class V>
KD_FN Reduced<V> reduce(V x) {
  using L = Lanes<V>;
  using I = typename L::I;
  x = at_most(at_least(x, all<V>(L::lowest_exp)), all<V>(L::highest_exp));
  const V shifted = x * (typename L::S)1.44269504088896341 + L::round;
  const V n = shifted - L::round;
  const V f = (x - n * L::ln2_hi) - n * L::ln2_lo;
  // The low bits of `shifted` are n; at the lowest x, 2^n is 0: exp is exactly 0, expm1 -1.
  const V power = (V)(((I)shifted << L::mantissa) + L::one);
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
// exp(x / c), x / c <= 88, for the rate of 1 / c; 0 where it underflows.
template <class S>
KD_FN S exp_rate(double inverse) {
  return S(sizeof(S) == 4 ? inverse * 1.44269504088896341 : inverse);
}
KD_FN vf exp_at_rate(vf x, float rate) {
  const vf y = x * rate;  // 2^y = 2^n 2^f, |f| <= 1 / 2
#if KD_BYTES == 64
  const vf n = (vf)_mm512_roundscale_ps((__m512)y, 0);
#else
  const vf low = at_least(y, all<vf>(-127.f)), shifted = low + Lanes<vf>::round;
  const vf n = shifted - Lanes<vf>::round;
#endif
  const vf f = y - n;
  vf p = all<vf>(1.5353300842e-4f);
  p = p * f + 1.3398848241e-3f;
  p = p * f + 9.6184369177e-3f;
  p = p * f + 5.5503323674e-2f;
  p = p * f + 2.4022647738e-1f;
  p = p * f + 6.9314718246e-1f;
  p = p * f + 1.f;
#if KD_BYTES == 64
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return select(y < all<vf>(-127.f), vf{}, p) * (vf)(((vi)shifted << 23) + 0x3f800000);
#endif
}
KD_FN vd exp_at_rate(vd x, double rate) { return exp_parts(x * rate).value; }

template <class V>
KD_FN V exp(V x) {
  return exp_parts(x).value;
}

// sum_{k>=1} 2 s^(2k+1) / (2k+1), over s, of log((1 + s) / (1 - s)) - 2 s.
KD_FN vf log_tail(vf s2) {
  vf r = all<vf>(2.f / 11);
  r = r * s2 + 2.f / 9;
  r = r * s2 + 2.f / 7;
  r = r * s2 + 2.f / 5;
  return (r * s2 + 2.f / 3) * s2;
}
KD_FN vd log_tail(vd s2) {
  vd r = all<vd>(2. / 21);
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
  const I bits = (I)u + (L::one - L::sqrt_half);
  const I k = (bits >> L::mantissa) - L::bias;
  const V n = __builtin_convertvector(k, V);
  const V m = (V)((bits & L::mantissa_mask) + L::sqrt_half);
  const I near = k == 0;
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
