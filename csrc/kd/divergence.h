// SPDX-License-Identifier: Apache-2.0
// The divergences, per class: included by every kernel, inside its own namespace and after its
// KD_FN, Pair, `expm1_pair` and `log1p_pair`. V is a float, a double or a vector of them.
//
// A divergence is sum p f(q / p), with p the probability under the base distribution and q under
// the other. From d = log(q / p), `terms` gives f and the derivatives a = df/dp and
// c = (q / p) df/dq, each up to a constant that the softmax cancels, and none with cancellation
// where d is small. The base is the student and the other the teacher; a kernel may exchange them,
// and use the `Swapped` divergence, so as to have d <= 0.
//
// To add one: a struct here, its Kind in rowwise.h, its line in KD_DIVERGENCES.

template <class V>
struct Ratio {
  V d, e, excess;             // log(q / p); q / p - 1; e - d
  V finite_d, finite_excess;  // the same, with d bounded below: (1 + e) d is then 0 at q = 0
  V log_p;
};

template <class V>
struct Terms {
  V value, a, c;
};

template <class S>
struct Shape {
  S alpha, beta;
};

// (1 + x) log(1 + x) - x, from log1p(x) and x - log1p(x).
template <class V>
KD_FN V entropy_gap(V x, const Pair<V>& log1p_x) {
  return x * log1p_x.value - log1p_x.excess;
}

template <class V>
KD_FN V entropy_gap(V x) {
  return entropy_gap(x, log1p_pair(x));
}

struct ForwardKL;

struct ReverseKL {  // sum p_s log(p_s / p_t)
  using Swapped = ForwardKL;
  static constexpr bool zero_teacher = false;  // finite where p_t = 0
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    return {r.excess, -r.d, r.e};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct ForwardKL {  // sum p_t log(p_t / p_s)
  using Swapped = ReverseKL;
  static constexpr bool zero_teacher = true;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    return {r.finite_d * r.e - r.finite_excess, -r.e, (S(1) + r.e) * r.finite_d};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct JS {  // beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = (1 - beta) p_s + beta p_t
  using Swapped = JS;
  static constexpr bool zero_teacher = true;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S> k) {
    const V x = k.beta * r.e;
    const Pair<V> l = log1p_pair(x);
    return {k.beta * (r.finite_d * r.e - r.finite_excess) - entropy_gap(x, l),
            (k.beta - S(1)) * l.value, k.beta * (S(1) + r.e) * (r.finite_d - l.value)};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return {k.alpha, S(1) - k.beta}; }
};

struct TV {  // sum |p_t - p_s| / 2
  using Swapped = TV;
  static constexpr bool zero_teacher = true;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    const V zero = r.e * S(0), half = zero + S(0.5);
    const V sign = select(r.e > zero, half, select(r.e < zero, -half, zero));
    return {r.e * sign, -sign, (S(1) + r.e) * sign};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct SkewForward;

struct SkewReverse {  // KL(p_s || alpha p_s + (1 - alpha) p_t)
  using Swapped = SkewForward;
  static constexpr bool zero_teacher = false;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S> k) {
    const V x = (S(1) - k.alpha) * r.e, shrink = x / (S(1) + x);
    const Pair<V> l = log1p_pair(x);
    return {l.excess, k.alpha * shrink - l.value, (S(1) + r.e) * (S(1) - k.alpha) * shrink};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct SkewForward {  // KL(p_t || alpha p_t + (1 - alpha) p_s)
  using Swapped = SkewReverse;
  static constexpr bool zero_teacher = false;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S> k) {
    const V mixture = S(1) + k.alpha * r.e, x = (S(1) - k.alpha) * r.e / mixture;
    const Pair<V> l = log1p_pair(x);
    return {mixture * entropy_gap(x, l), -(S(1) - k.alpha) * x,
            (S(1) + r.e) * (l.value - k.alpha * x)};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct Jeffreys {  // KL(p_t || p_s) + KL(p_s || p_t)
  using Swapped = Jeffreys;
  static constexpr bool zero_teacher = false;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    return {r.e * r.d, -r.e - r.d, (S(1) + r.e) * r.finite_d + r.e};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct AB {  // -(p_t^alpha p_s^beta - alpha/gamma p_t^gamma - beta/gamma p_s^gamma) / (alpha beta)
  using Swapped = AB;
  static constexpr bool zero_teacher = false;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S> k) {
    const S gamma = k.alpha + k.beta;
    const Pair<V> at_alpha = expm1_pair(k.alpha * r.d), at_gamma = expm1_pair(gamma * r.d);
    Terms<V> t{(at_gamma.excess * (k.alpha / gamma) - at_alpha.excess) / (k.alpha * k.beta),
               -at_alpha.value / k.alpha, (at_gamma.value - at_alpha.value) / k.beta};
    if (gamma != S(1)) {
      const V power = exp((gamma - S(1)) * r.log_p);
      t = {t.value * power, t.a * power, t.c * power};
    }
    return t;
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return {k.beta, k.alpha}; }
};

struct TeacherEntropy;  // sum -p_t log p_s with the arguments exchanged

struct CrossEntropy {  // sum -p_t log p_s
  using Swapped = TeacherEntropy;
  static constexpr bool zero_teacher = true;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    const V value = -(S(1) + r.e) * r.log_p;
    return {value, -r.e, value};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct TeacherEntropy {
  using Swapped = CrossEntropy;
  static constexpr bool zero_teacher = true;
  template <class V, class S>
  static KD_FN Terms<V> terms(const Ratio<V>& r, Shape<S>) {
    const V value = -(r.log_p + r.d);
    return {value, value, r.e};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

// Kind and struct; renyi is a function of ab's sum (alpha, 1 - alpha).
#define KD_DIVERGENCES(X)                                                                \
  X(forward_kl, ForwardKL) X(reverse_kl, ReverseKL) X(js, JS) X(tv, TV)                  \
  X(skew_forward, SkewForward) X(skew_reverse, SkewReverse) X(jeffreys, Jeffreys)        \
  X(ab, AB) X(renyi, AB) X(cross_entropy, CrossEntropy)
