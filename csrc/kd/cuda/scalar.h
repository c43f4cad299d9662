// SPDX-License-Identifier: Apache-2.0
// The shared formulas on a GPU, where a thread has one class in hand and not a vector of them.
// Included inside a kernel's namespace, after device.h.
#define KD_FN KD_DEVICE

template <class V> struct Lanes;
template <class S> struct VectorOf { using V = S; };

template <class V, class S>
KD_FN V all(S x) {
  return (V)x;
}
template <class V>
KD_FN V select(bool mask, V yes, V no) {
  return mask ? yes : no;
}
template <class V>
KD_FN V at_least(V x, V low) {
  return low > x ? low : x;
}
template <class V>
KD_FN V at_most(V x, V high) {
  return high < x ? high : x;
}
KD_FN float at_least(float x, float low) { return larger_or_nan(x, low); }
KD_FN float at_most(float x, float high) { return smaller_or_nan(x, high); }
KD_FN float magnitude(float x) { return __builtin_fabsf(x); }
KD_FN double magnitude(double x) { return __builtin_fabs(x); }

KD_FN int32_t as_integer(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
KD_FN int64_t as_integer(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}
KD_FN int32_t shifted_left(int32_t bits, int by) { return (int32_t)((uint32_t)bits << by); }
KD_FN int64_t shifted_left(int64_t bits, int by) { return (int64_t)((uint64_t)bits << by); }
template <class V, class I>
KD_FN V as_number(I bits) {
  static_assert(sizeof(V) == sizeof(I));
  V x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
template <class V, class I>
KD_FN V to_number(I n) {
  return (V)n;
}

#include "../elementary.h"

// What near classes take it for, |f| < 0.34, a coefficient less gives as well: relative error 2^-22.
KD_FN float expm1_tail(float f) {
  float q = 1.3940639e-3f;
  q = q * f + 8.3629042e-3f;
  q = q * f + 4.1666381e-2f;
  q = q * f + 1.6666579e-1f;
  return q * f + 0.5f;
}
KD_FN bool is_near(float x) { return magnitude(x) < 0.34f; }

template <> struct Lanes<float> : Single { using I = int32_t; };
template <> struct Lanes<double> : Double { using I = int64_t; };

// An exponent of what exp_of takes, in units of 1.
template <class S> constexpr S unit = sizeof(S) == 4 ? S(0.69314718055994531) : S(1);
KD_FN float exp_of(float x) { return exp2_approx(x); }
KD_FN double exp_of(double x) { return exp_parts(x).value; }
KD_FN float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
KD_FN double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

KD_FN float exp_at_rate(float x, float rate) { return exp2_approx(x * rate); }
KD_FN double exp_at_rate(double x, double rate) { return exp_parts(x * rate).value; }
