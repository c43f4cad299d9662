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

// As it is rounded: the compiler does not fuse its product with the sum that it is used in.
template <class V>
KD_FN V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class V>
KD_FN typename Lanes<V>::I as_integer(V x) {
  return (typename Lanes<V>::I)x;
}
template <class I>
KD_FN I shifted_left(I bits, int by) {
  return bits << by;
}
template <class V>
KD_FN V as_number(typename Lanes<V>::I x) {
  return (V)x;
}
template <class V>
KD_FN V to_number(typename Lanes<V>::I x) {
  return __builtin_convertvector(x, V);
}
template <class V>
KD_FN V magnitude(V x) {
  return as_number<V>(as_integer(x) & Lanes<V>::magnitude);
}

#include "../elementary.h"

template <> struct Lanes<vf> : Single {
  using I = vi;
  static constexpr int count = KD_BYTES / 4;
};
template <> struct Lanes<vd> : Double {
  using I = vl;
  static constexpr int count = KD_BYTES / 8;
};

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

// exp(x / c), x / c <= 88, for the rate of 1 / c; 0 where it underflows.
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
