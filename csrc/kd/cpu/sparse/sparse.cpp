// SPDX-License-Identifier: Apache-2.0
// Divergences from a teacher that is stored as its k largest values, and their gradients, fused.
// The student's row is read from memory once and its gradient written once (fp32: 8 bytes an
// element); nothing as wide as the row is made for the teacher.
//
//   collect  the stored classes: their values, the student's logits there
//   measure  over the other classes, the tail: the student's maximum and sum of exponentials
//   compare  the k + 1 probabilities in double: value and derivatives
//   emit     the gradient: in the tail a multiple of the exponential, then the k stored classes
//
// The tail is summed without the stored classes, whose logits the sweeps overwrite by -inf in the
// block that they work on: what is left of 1 is never found as a difference.
#include <stddef.h>
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../sparse.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../../divergence.h"
#include "../sweep.h"

constexpr double infinity = __builtin_inf();

// Memory of one task, for a row at a time.
struct Scratch {
  double *z, *v;               // (k + 1,) the student's logits and the teacher's values
  double *log_s, *log_t;       // log-probabilities; the tail's stand last
  double *to_s, *to_t;         // gradients per du of either side
  double *p_s, *p_t;
  int64_t *id, *slot;          // (k,) class, and place among the row's k values
  int32_t *next, *head;        // stored classes by block: head[block], next[entry], -1: no more
  uint64_t* seen;              // (C / 64,) classes that the row has stored
  char* memory;

  explicit Scratch(const TopKParams& p) {
    const size_t k = p.k + 1, blocks = p.classes / block + 1, words = p.classes / 64 + 1;
    memory = (char*)operator new(8 * (8 * k + 2 * k + words) + 4 * (k + blocks));
    double** const arrays[] = {&z, &v, &log_s, &log_t, &to_s, &to_t, &p_s, &p_t};
    char* at = memory;
    for (double** array : arrays) *array = (double*)at, at += 8 * k;
    id = (int64_t*)at, at += 8 * k;
    slot = (int64_t*)at, at += 8 * k;
    seen = (uint64_t*)at, at += 8 * words;
    next = (int32_t*)at, at += 4 * k;
    head = (int32_t*)at;
    __builtin_memset(seen, 0, 8 * words);
    __builtin_memset(head, -1, 4 * blocks);
  }
  ~Scratch() { operator delete(memory); }
  Scratch(const Scratch&) = delete;
};

template <class S>
struct Row {
  const TopKParams& p;
  Scratch& w;
  int64_t index;
  RowReader<S> student;
  double tau_s, tau_t;
  // collected
  int n = 0;                   // stored classes
  bool sound = true;           // no NaN, +inf
  Fault fault = Fault::none;
  // measured, of the tail
  S top = floor_of<S>;
  double sum = 0;              // of exp((z - top) / tau_s)
  double slope = 0;            // of exp(...) (z - top)
  // compared
  int terms = 0;               // n, or n + 1
  double log_tail = -infinity; // log of the mass that the teacher's values leave
  double whole = 0;            // the teacher's logsumexp, where known
  double value = 0;

  Row(const TopKParams& p, Scratch& w, int64_t i)
      : p(p), w(w), index(i), student{p.student, row_offset(p.student, i)},
        tau_s(get(p.tau_s, i)), tau_t(get(p.tau_t, i)) {}
  bool has_tail() const { return terms > n; }
};

template <class S>
void collect(Row<S>& r) {
  const TopKParams& p = r.p;
  Scratch& w = r.w;
  const RowReader<double> values{p.values, row_offset(p.values, r.index)};
  const int64_t* ids = p.indices + r.index * p.k;
  double buffer[block];
  for_blocks(p.k, [&](int64_t first, int n) {
    const double* v = values.get(first, n, buffer);
    for (int j = 0; j < n; j++) {
      if (v[j] == -infinity) continue;
      const int64_t id = ids[first + j];
      const uint64_t bit = uint64_t(1) << (id & 63);
      if (id < 0 || id >= p.classes) r.fault = Fault::index;
      else if (w.seen[id / 64] & bit) r.fault = Fault::duplicate;
      if (r.fault != Fault::none) return;
      w.seen[id / 64] |= bit;
      S z;
      w.z[r.n] = *r.student.get(id, 1, &z);
      w.v[r.n] = v[j], w.id[r.n] = id, w.slot[r.n] = first + j;
      w.next[r.n] = w.head[id / block], w.head[id / block] = r.n++;
      r.sound &= v[j] < infinity;
    }
  });
}
// Forgets the row's stored classes.
template <class S>
void release(Row<S>& r) {
  for (int i = 0; i < r.n; i++)
    r.w.seen[r.w.id[i] / 64] = 0, r.w.head[r.w.id[i] / block] = -1;
}

template <class F>
KD_FN void for_stored(const Scratch& w, int64_t first, const F& f) {
  for (int i = w.head[first / block]; i >= 0; i = w.next[i]) f(i, (int)(w.id[i] - first));
}

// A block of the student's logits, the stored classes off.
template <class S>
const S* tail_of(const Row<S>& r, int64_t first, int n, S* buffer) {
  const S* z = r.student.get(first, n, buffer);
  if (r.w.head[first / block] < 0) return z;
  if (z != buffer) __builtin_memcpy(buffer, z, n * sizeof(S));
  for_stored(r.w, first, [&](int, int at) { buffer[at] = floor_of<S>; });
  return buffer;
}

template <class S>
void measure(Row<S>& r) {
  using V = typename VectorOf<S>::V;
  const S rate = exp_rate<S>(1 / r.tau_s);
  alignas(64) S buffer[block];
  for_blocks(r.p.classes, [&](int64_t first, int n) {
    const S* z = tail_of(r, first, n, buffer);
    V high = all<V>(r.top);
    sweep<V>(n, [&](int i, auto w) { high = at_least(read<V>(z + i, w, floor_of<S>), high); });
    const S top = largest(high);
    if (top != r.top) r.sum *= __builtin_exp(((double)r.top - top) / r.tau_s), r.top = top;
    V total{};
    sweep<V>(n, [&](int i, auto w) {
      total += exp_at_rate(read_logits<V>(z + i, w) - top, rate);
    });
    r.sum += sum(total);
  });
}

KD_FN double largest_of(const double* x, int n) {
  double high = -infinity;
  for (int i = 0; i < n; i++) high = x[i] > high ? x[i] : high;
  return high;
}
// log sum exp(x / tau); -inf of nothing.
KD_FN double log_sum_exp(const double* x, int n, double tau) {
  const double high = largest_of(x, n), inverse = 1 / tau;
  if (!(high > -infinity)) return high;
  vd total{};
  sweep<vd>(n, [&](int i, auto w) {
    total += exp((read<vd>(x + i, w, -infinity) - high) * inverse);
  });
  return high * inverse + __builtin_log(sum(total));
}
KD_FN double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high > -infinity ? high + __builtin_log1p(__builtin_exp(low - high)) : high;
}

// The student's log-probabilities; false where it has none.
template <class S>
bool student_side(Row<S>& r) {
  Scratch& w = r.w;
  const bool tail = r.top > floor_of<S>;
  const double inside = log_sum_exp(w.z, r.n, r.tau_s);
  const double outside = tail ? r.top / r.tau_s + __builtin_log(r.sum) : -infinity;
  const double total = log_add(inside, outside);
  for (int i = 0; i < r.n; i++) w.log_s[i] = w.z[i] / r.tau_s - total;
  w.log_s[r.n] = outside - total;
  return total > -infinity && total < infinity && r.sum < beyond;
}

// The teacher's log-probabilities; false where it has none.
template <class S>
bool teacher_side(Row<S>& r) {
  const TopKParams& p = r.p;
  Scratch& w = r.w;
  const int64_t others = p.classes - r.n;
  const double inside = log_sum_exp(w.v, r.n, r.tau_t);
  double tail = -infinity, total = inside;
  if (p.missing == Missing::tail && others > 0) {
    const bool known = p.logsumexp.data;
    if (known) r.whole = get(p.logsumexp, r.index);
    if (!(r.whole < infinity)) return false;
    const double captured =
        known ? inside - r.whole : r.tau_t == 1 ? inside : log_sum_exp(w.v, r.n, 1);
    if (captured < 0) {
      r.log_tail = __builtin_log(-__builtin_expm1(captured));
      const double width = p.spread ? __builtin_log((double)others) : 0;
      tail = known ? r.whole + r.log_tail : width + (r.log_tail - width) / r.tau_t;
    } else if (p.kind == Kind::reverse_kl) {
      tail = inside + __builtin_log(least_tail);
    }
    total = log_add(inside, tail);
  }
  for (int i = 0; i < r.n; i++) w.log_t[i] = w.v[i] / r.tau_t - total;
  w.log_t[r.n] = tail - total;
  return total > -infinity && total < infinity;
}

// What both sides' terms sum to.
struct Sums {
  double value, to_s, to_t, mass_s, mass_t;
};

// The base is the side with the larger probability, as in the rowwise family's double path.
template <class K, class S>
Sums compare(Row<S>& r, Shape<double> shape) {
  const Scratch& w = r.w;
  vd value{}, own_s{}, own_t{}, mass_s{}, mass_t{};
  sweep<vd>(r.terms, [&](int i, auto part) {
    const vd zero{}, s = read<vd>(w.log_s + i, part, -infinity);
    const vd t = read<vd>(w.log_t + i, part, -infinity);
    const vd p_s = exp(s), p_t = exp(t);
    const vd difference = select(s == t, zero, t - s);  // -inf on both sides, past the end
    const auto student = difference <= zero;
    const vd d = select(student, difference, -difference);
    const vd p = select(student, p_s, p_t), q = select(student, p_t, p_s);
    const auto near = is_near(d);
    const Exp<vd> e = exp_parts(d);
    const Sides<vd, decltype(near)> sides{
        p, q, select(near, p * e.minus_one, q - p), d, at_least(d, all<vd>(Lanes<vd>::lowest_exp)),
        e.minus_one, p * e.excess, select(student, s, t), near};
    const Terms<vd> f = K::terms(sides, shape), g = K::Swapped::terms(sides, K::swap(shape));
    const auto live = p > zero;  // else it contributes nothing, whatever its ratio
    const vd to_s = select(live, select(student, f.base, g.other), zero);
    const vd to_t = select(live, select(student, f.other, g.base), zero);
    value += select(live, select(student, f.value, g.value), zero);
    own_s += to_s, own_t += to_t, mass_s += p_s, mass_t += p_t;
    write<vd>(w.to_s + i, part, to_s), write<vd>(w.to_t + i, part, to_t);
    write<vd>(w.p_s + i, part, p_s), write<vd>(w.p_t + i, part, p_t);
  });
  return {sum(value), sum(own_s), sum(own_t), sum(mass_s), sum(mass_t)};
}

template <class S>
Sums compare_kind(Row<S>& r) {
  const Shape<double> shape{0, r.p.beta};
  switch (r.p.kind) {
    case Kind::reverse_kl: return compare<ReverseKL>(r, shape);
    case Kind::js: return compare<JS>(r, shape);
    case Kind::tv: return compare<TV>(r, shape);
    default: return compare<ForwardKL>(r, shape);
  }
}

// The value, and both gradients per du of the k + 1 classes.
template <class S>
void differentiate(Row<S>& r) {
  const Scratch& w = r.w;
  // A class that is off on both sides is no class.
  r.terms = r.n + (w.log_s[r.n] > -infinity || w.log_t[r.n] > -infinity);
  const Sums sums = compare_kind(r);
  const bool infinite = sums.value > beyond;
  r.value = infinite ? infinity : sums.value;
  const double centre_s = sums.to_s / sums.mass_s, centre_t = sums.to_t / sums.mass_t;
  for (int i = 0; i < r.terms; i++) {
    // Only forward KL has an infinite value, and it keeps the student's gradient.
    w.to_s[i] = infinite ? w.p_s[i] - w.p_t[i] : w.to_s[i] - w.p_s[i] * centre_s;
    w.to_t[i] = infinite ? 0 : w.to_t[i] - w.p_t[i] * centre_t;
  }
  if (!r.has_tail()) w.to_s[r.n] = w.to_t[r.n] = 0;
}

// The teacher's gradients, from those per du: to the values, over tau_t; to what tau_t divides; to
// logsumexp. `log_tail` is a function of the values too.
struct TeacherSlopes {
  double tau = 0, logsumexp = 0;
};
template <class S>
TeacherSlopes chain_teacher(Row<S>& r) {
  const TopKParams& p = r.p;
  const Scratch& w = r.w;
  const bool known = p.logsumexp.data, tail = r.log_tail > -infinity && r.has_tail();
  const double to_tail = tail ? w.to_t[r.n] : 0;
  TeacherSlopes out;
  if (tail && known) out.logsumexp = to_tail / __builtin_exp(r.log_tail);
  if (tail && !known) {
    const double width = p.spread ? __builtin_log((double)(p.classes - r.n)) : 0;
    out.tau = to_tail * (r.log_tail - width);
  }
  for (int i = 0; i < r.n; i++) {
    const double u = known ? w.v[i] / r.tau_t - r.whole : w.v[i];
    const double through = tail ? to_tail * __builtin_exp(u - r.log_tail) : 0;
    out.tau += (known ? w.to_t[i] - through : w.to_t[i]) * w.v[i];
    w.to_t[i] = (w.to_t[i] - through) / r.tau_t;
  }
  return out;
}

// What the student's temperature divides: du z, about the largest.
template <class S>
double student_slope(const Row<S>& r) {
  const Scratch& w = r.w;
  const bool tail = r.has_tail() && r.top > floor_of<S>;
  double high = largest_of(w.z, r.n), total = 0;
  if (tail && r.top > high) high = r.top;
  if (tail) total = w.to_s[r.n] * (r.top - high + r.slope / r.sum);
  for (int i = 0; i < r.n; i++)
    if (w.z[i] > -infinity) total += w.to_s[i] * (w.z[i] - high);
  return total;
}

template <class S, class T>
void put(const RowWriter<S>& to, int64_t at, T x) {
  S value = S(x);
  if (to.direct) *to.at(at, nullptr) = value;
  else to.flush(at, 1, &value);
}

// The student's gradient, and the tail's part of its temperature's. `times`: of du.
template <class S>
void emit(Row<S>& r, double times) {
  using V = typename VectorOf<S>::V;
  const TopKParams& p = r.p;
  const Scratch& w = r.w;
  const RowWriter<S> to(p.grad_student, r.index, false);
  if (p.missing == Missing::renormalize) {
    to.zero(p.classes);
    for (int i = 0; i < r.n && to.wanted(); i++) put(to, w.id[i], w.to_s[i] * times);
    return;
  }
  alignas(64) S buffer[block], out[block];
  const bool tail = r.top > floor_of<S> || r.top != r.top;
  const S top = r.top, rate = exp_rate<S>(1 / r.tau_s);
  const S each = tail ? S(w.to_s[r.n] * times / r.sum) : S(0);
  for_blocks(p.classes, [&](int64_t first, int n) {
    S* grad = to.wanted() ? to.at(first, out) : out;
    const S* z = tail_of(r, first, n, buffer);
    V slope{};
    sweep<V>(n, [&](int i, auto part) {
      const V x = read_logits<V>(z + i, part) - top, e = exp_at_rate(x, rate);
      write<V>(grad + i, part, e * each);
      slope += e * x;
    });
    r.slope += sum(slope);
    if (!to.wanted()) return;
    for_stored(w, first, [&](int i, int at) { grad[at] = S(w.to_s[i] * times); });
    to.flush(first, n, grad);
  });
}

// A power of two for the row's fp16 gradients: half_boost, or less where one would overflow.
template <class S>
double half_boost_of(const Row<S>& r, double times_s, double times_t) {
  double largest = 0, boost = half_boost;
  for (int i = 0; i <= r.n; i++) {
    const double s = __builtin_fabs(r.w.to_s[i] * times_s);
    const double t = i < r.n ? __builtin_fabs(r.w.to_t[i] * times_t) : 0;
    if (s > largest) largest = s;
    if (t > largest) largest = t;
  }
  while (boost * largest > 32768 && boost > 1e-30) boost /= 2;
  return boost;
}

template <class S>
void finish(Row<S>& r) {
  const TopKParams& p = r.p;
  const Scratch& w = r.w;
  const double weight = get(p.row_weight, r.index), scale = p.t2 ? r.tau_s * r.tau_s : 1;
  const bool sound = r.sound && student_side(r) && teacher_side(r);
  TeacherSlopes slopes;
  if (sound) {
    differentiate(r);
    if (p.grad_values.data || p.row_grads) slopes = chain_teacher(r);
  } else {
    r.value = slopes.tau = slopes.logsumexp = __builtin_nan("");
    for (int i = 0; i <= r.n; i++) w.to_s[i] = w.to_t[i] = r.value;
  }
  const bool half = p.grad_student.dtype == DType::float16 || p.grad_values.dtype == DType::float16;
  const double boost = half ? half_boost_of(r, scale / r.tau_s, scale) : half_boost;
  const auto saved = [&](const Rows& grad) {
    if (grad.dtype != DType::float16) return weight * p.factor;
    return weight == 0 ? 0 : boost;
  };
  if (p.grad_student.data || p.row_grads) emit(r, saved(p.grad_student) * scale / r.tau_s);
  if (p.grad_values.data) {
    const RowWriter<double> to(p.grad_values, r.index, false);
    const double times = saved(p.grad_values) * scale;
    to.zero(p.k);
    for (int i = 0; i < r.n; i++) put(to, w.slot[i], w.to_t[i] * times);
  }
  const bool infinite = r.value > beyond;
  p.row_loss[r.index] = infinite && weight == 0 ? 0 : weight * scale * r.value;
  if (!p.row_grads) return;
  const double factor = weight * p.factor, value = infinite ? 0 : r.value;
  const double slope_s = !sound ? r.value : infinite ? 0 : student_slope(r);
  double* out = p.row_grads + r.index;
  out[0] = scale * value * p.factor;
  out[p.rows] = factor * ((p.t2 ? 2 * r.tau_s * value : 0) - scale / (r.tau_s * r.tau_s) * slope_s);
  out[2 * p.rows] = -factor * scale / (r.tau_t * r.tau_t) * slopes.tau;
  out[3 * p.rows] = factor * scale * slopes.logsumexp;
  out[4 * p.rows] = factor / boost;
}

template <class S>
void row(const TopKParams& p, Scratch& w, int64_t i) {
  Row<S> r(p, w, i);
  collect(r);
  p.faults[i] = r.fault;
  if (r.fault == Fault::none) {
    if (p.missing != Missing::renormalize) measure(r);
    finish(r);
  }
  release(r);
}

void skip_row(const TopKParams& p, int64_t i) {
  p.row_loss[i] = 0;
  p.faults[i] = Fault::none;
  RowWriter<float>(p.grad_student, i, false).zero(p.classes);
  RowWriter<float>(p.grad_values, i, false).zero(p.k);
  for (int k = 0; p.row_grads && k < 5; k++) p.row_grads[k * p.rows + i] = 0;
}

void sparse(const TopKParams& p, int64_t begin, int64_t end) {
  Scratch scratch(p);
  for (int64_t i = begin; i < end; i++) {
    if (!row_counts(p, p.ignore_index, i)) skip_row(p, i);
    else if (p.student.dtype == DType::float64 || p.values.dtype == DType::float64)
      row<double>(p, scratch, i);
    else row<float>(p, scratch, i);
  }
}

}  // namespace KD_ISA
}  // namespace kd
