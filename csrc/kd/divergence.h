// SPDX-License-Identifier: Apache-2.0
// The divergences, per class: included by every kernel, inside its own namespace and after its
// KD_FN, `all`, `select`, `at_most`, `exp`, `exp_parts` and `log1p_parts`. V is a float, a double
// or a vector of them.
//
// A divergence is sum p f(q / p), with p the probability under the base distribution and q under
// the other. `terms` gives p f, and the derivatives p df/dp and q df/dq, each up to a multiple of p
// or q that the softmax cancels. Where p and q are near, nothing may cancel; where they are far,
// nothing may depend on q / p, whose relative error grows with its logarithm. The base is the
// student and the other the teacher; a kernel may exchange them and use the `Swapped` divergence,
// so as to have q <= p.
//
// To add one: a struct here, its Kind and its place in KD_DIVERGENCES in rowwise.h.

template <class V, class M>
struct Sides {
  V p, q, gap;      // gap: q - p
  V d, finite_d;    // log(q / p), and that bounded below: q finite_d is then 0 at q = 0
  V e, p_excess;    // q / p - 1; p (e - d)
  V log_p;
  M near;           // |d| is small
};

template <class V>
struct Terms {
  V value, base, other;  // p f, p df/dp, q df/dq
};

template <class S>
struct Shape {
  S alpha, beta;
};

struct Unchanged {  // divergences whose parameters mean the same with the arguments exchanged
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return k; }
};

struct ForwardKL;

struct ReverseKL : Unchanged {  // sum p_s log(p_s / p_t)
  using Swapped = ForwardKL;
  static constexpr bool zero_teacher = false;  // finite where p_t = 0
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    const V weighted = c.p * c.d;
    return {select(c.near, c.p_excess, c.gap - weighted), -weighted, c.gap};
  }
};

struct ForwardKL : Unchanged {  // sum p_t log(p_t / p_s)
  using Swapped = ReverseKL;
  static constexpr bool zero_teacher = true;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    const V weighted = c.q * c.finite_d;
    const V value = select(c.near, c.gap, c.q) * c.finite_d - select(c.near, c.p_excess, c.gap);
    return {value, -c.gap, weighted};
  }
};

struct JS {  // beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = (1 - beta) p_s + beta p_t
  using Swapped = JS;
  static constexpr bool zero_teacher = true;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S> k) {
    const V x = k.beta * c.e, m = c.p + k.beta * c.gap;
    const Log1p<V> l = log1p_parts(x);  // log(m / p)
    const V near = k.beta * (c.gap * c.finite_d - c.p_excess) - c.p * (x * l.value - l.excess);
    const V far = k.beta * (c.q * c.finite_d) - m * l.value;
    return {select(c.near, near, far), (k.beta - S(1)) * (c.p * l.value),
            k.beta * (c.q * (c.finite_d - l.value))};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return {k.alpha, S(1) - k.beta}; }
};

struct TV : Unchanged {  // sum |p_t - p_s| / 2
  using Swapped = TV;
  static constexpr bool zero_teacher = true;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    const V zero = all<V>(S(0)), half = all<V>(S(0.5));
    const V sign = select(c.gap > zero, half, select(c.gap < zero, -half, zero));
    return {c.gap * sign, -c.p * sign, c.q * sign};
  }
};

struct SkewForward;

struct SkewReverse : Unchanged {  // KL(p_s || m), m = alpha p_s + (1 - alpha) p_t
  using Swapped = SkewForward;
  static constexpr bool zero_teacher = false;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S> k) {
    const S rest = S(1) - k.alpha;
    const V x = rest * c.e, shrink = x / (S(1) + x);
    const Log1p<V> l = log1p_parts(x);  // log(m / p)
    const V weighted = c.p * l.value;
    return {select(c.near, c.p * l.excess, rest * c.gap - weighted),
            k.alpha * (c.p * shrink) - weighted, rest * (c.q * shrink)};
  }
};

struct SkewForward : Unchanged {  // KL(p_t || m), m = alpha p_t + (1 - alpha) p_s
  using Swapped = SkewReverse;
  static constexpr bool zero_teacher = false;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S> k) {
    const S rest = S(1) - k.alpha;
    const V mixture = S(1) + k.alpha * c.e, x = rest * c.e / mixture;  // m / p; q / m - 1
    const Log1p<V> l = log1p_parts(x);                                // log(q / m)
    const V near = c.p * mixture * (x * l.value - l.excess);
    const V far = c.q * l.value - rest * c.gap;
    return {select(c.near, near, far), -rest * (c.p * x), c.q * (l.value - k.alpha * x)};
  }
};

struct Jeffreys : Unchanged {  // KL(p_t || p_s) + KL(p_s || p_t)
  using Swapped = Jeffreys;
  static constexpr bool zero_teacher = false;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    return {c.gap * c.d, -c.gap - c.p * c.d, c.q * c.finite_d + c.gap};
  }
};

struct AB {  // -(p_t^alpha p_s^beta - alpha/gamma p_t^gamma - beta/gamma p_s^gamma) / (alpha beta)
  using Swapped = AB;
  static constexpr bool zero_teacher = false;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S> k) {
    const S gamma = k.alpha + k.beta, product = k.alpha * k.beta;
    const bool plain = gamma == S(1);
    const V log_q = c.log_p + c.d;
    const V p = plain ? c.p : exp(gamma * c.log_p), q = plain ? c.q : exp(gamma * log_q);
    // Far: the three powers. Near: p^gamma times the powers of q / p, less 1.
    const V mixed = exp(k.alpha * log_q + k.beta * c.log_p);
    const Exp<V> at_alpha = exp_parts(k.alpha * c.d), at_gamma = exp_parts(gamma * c.d);
    const V near = p * (at_gamma.excess * (k.alpha / gamma) - at_alpha.excess);
    const V far = k.alpha / gamma * q + k.beta / gamma * p - mixed;
    const auto close = (c.d < all<V>(S(3))) & (c.d > all<V>(S(-3)));  // the powers lose log(p) digits
    return {select(close, near, far) / product,
            select(close, -p * at_alpha.minus_one, p - mixed) / k.alpha,
            select(close, p * (at_gamma.minus_one - at_alpha.minus_one), q - mixed) / k.beta};
  }
  template <class S>
  static KD_FN Shape<S> swap(Shape<S> k) { return {k.beta, k.alpha}; }
};

struct TeacherEntropy;  // CrossEntropy with the arguments exchanged

struct CrossEntropy : Unchanged {  // sum -p_t log p_s
  using Swapped = TeacherEntropy;
  static constexpr bool zero_teacher = true;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    const V value = -c.q * c.log_p;
    return {value, -c.gap, value};
  }
};

struct TeacherEntropy : Unchanged {
  using Swapped = CrossEntropy;
  static constexpr bool zero_teacher = true;
  template <class V, class M, class S>
  static KD_FN Terms<V> terms(const Sides<V, M>& c, Shape<S>) {
    const V value = -c.p * (c.log_p + c.d);
    return {value, value, c.gap};
  }
};
