// SPDX-License-Identifier: Apache-2.0
// Attention of classes to classes, fused: softening, scores, softmax, mean and residual, and their
// gradients. Eager holds several N x K x K maps; here a pair of classes is a few instructions and an
// exponential in registers, and memory grows with N x K.
//
// A task takes a few rows of the score matrix through all samples, so that the rows stay in cache
// (the matrix is read once a call) and their gradient has one owner, which adds the samples up in
// their order:
//
//   soften    s = teacher / temperature, padded to whole vectors
//   forward   per row and sample a sweep for the largest score and one for the sums
//   backward  the same scores again, and the gradients of the coefficients
//   collect   what several tasks have added to, summed in the order of the tasks
//   teacher   the gradient to the teacher, sample by sample; a frozen teacher skips it
//
// Sums over samples are double where they are single numbers, and fp32 per element.
#include <stdint.h>

#include <new>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../attention.h"
#include "../../product.h"
#include "../../row_attention.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "product.h"
#include "rows.h"

constexpr int R = score_rows;

template <class S>
struct Buffer {
  S* const data;
  explicit Buffer(int64_t n)
      : data((S*)::operator new(n * sizeof(S), std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
};

// Rows [first, first + R) of a head's scores, in the unit of `exp_at_rate` and padded by classes
// that are off. Past the matrix's end the last row is repeated.
template <class S>
struct ScoreRows {
  const ClassAttention& p;
  const int64_t first, width, stride = p.classes + 1;
  Buffer<S> buffer{(R + 2) * width};
  S* const pairs = buffer.data;             // E
  S* const by_key = pairs + R * width;      // b
  S* const values = by_key + width;         // v
  S a, c[R], u;

  ScoreRows(const ClassAttention& p, int64_t first)
      : p(p), first(first), width(padded(p.classes)) {}
  int64_t row(int r) const { return first + r < p.classes ? first + r : p.classes - 1; }
  bool exists(int r) const { return first + r < p.classes; }

  void load_head(int64_t head) {
    const S unit = exp_rate<S>(1);
    const S* scores = (const S*)p.scores + head * stride * stride;
    const S* v = (const S*)p.values + head * stride;
    const S* b = scores + p.classes * stride;
    for (int64_t j = 0; j < width; j++) {
      const bool inside = j < p.classes;
      for (int r = 0; r < R; r++)
        pairs[r * width + j] = inside ? scores[row(r) * stride + j] * unit : floor_of<S>;
      by_key[j] = inside ? b[j] * unit : S(0);
      values[j] = inside ? v[j] : S(0);
    }
    a = b[p.classes], u = v[p.classes];
    for (int r = 0; r < R; r++) c[r] = scores[row(r) * stride + p.classes];
  }
};

// The R classes as queries, in one sample: a score is E + s_j slope + b_j s.
template <class S>
struct Queries {
  const S* soft;
  S s[R], slope[R];

  Queries(const ScoreRows<S>& rows, int64_t sample)
      : soft((const S*)rows.p.soft + sample * rows.width) {
    for (int r = 0; r < R; r++) {
      const S s_i = soft[rows.row(r)];
      s[r] = s_i <= floor_of<S> ? S(0) : s_i;  // NaN stays
      slope[r] = (rows.a * s[r] + rows.c[r]) * exp_rate<S>(1);
    }
  }
};

// A vector of classes as keys: their s, 0 where they are off.
template <bool some_off, class V, class S>
struct Keys {
  V s, b, barrier;
  KD_FN Keys(const S* soft, const S* by_key, int64_t j) : s(load<V>(soft + j)), b(load<V>(by_key + j)) {
    if constexpr (some_off) {
      const auto off = s <= all<V>(floor_of<S>);
      s = select(off, V{}, s), barrier = select(off, all<V>(floor_of<S>), V{});
    }
  }
  KD_FN V score(const S* pairs, S s_i, S slope) const {
    const V x = load<V>(pairs) + s * slope + b * s_i;
    if constexpr (some_off) return x + barrier;
    return x;
  }
};

template <class S>
struct Softmax {
  S shift[R], total[R], mean_s[R], mean_v[R];
};

template <bool some_off, class S>
void attend(const ScoreRows<S>& rows, const Queries<S>& q, Softmax<S>& out) {
  using V = typename VectorOf<S>::V;
  V top[R], total[R]{}, sum_s[R]{}, sum_v[R]{};
  for (int r = 0; r < R; r++) top[r] = all<V>(floor_of<S>);
  for (int64_t j = 0; j < rows.width; j += Lanes<V>::count) {
    const Keys<some_off, V, S> keys(q.soft, rows.by_key, j);
    for (int r = 0; r < R; r++)
      top[r] = at_least(keys.score(rows.pairs + r * rows.width + j, q.s[r], q.slope[r]), top[r]);
  }
  for (int r = 0; r < R; r++) out.shift[r] = largest(top[r]);
  for (int64_t j = 0; j < rows.width; j += Lanes<V>::count) {
    const Keys<some_off, V, S> keys(q.soft, rows.by_key, j);
    const V v = load<V>(rows.values + j);
    for (int r = 0; r < R; r++) {
      const V x = keys.score(rows.pairs + r * rows.width + j, q.s[r], q.slope[r]);
      const V e = exp_at_rate(x - out.shift[r], S(1));
      total[r] += e, sum_s[r] += e * keys.s, sum_v[r] += e * v;
    }
  }
  for (int r = 0; r < R; r++) {
    out.total[r] = sum(total[r]);
    out.mean_s[r] = sum(sum_s[r]) / out.total[r], out.mean_v[r] = sum(sum_v[r]) / out.total[r];
  }
}

template <class S>
S* stat(const ClassAttention& p, int which, int64_t head, int64_t sample) {
  return (S*)p.stats + ((which * p.heads + head) * p.rows + sample) * p.classes;
}

template <class S>
void forward(const ClassAttention& p, int64_t task) {
  ScoreRows<S> rows(p, task * R);
  const int n = p.classes - rows.first < R ? (int)(p.classes - rows.first) : R;
  for (int64_t head = 0; head < p.heads; head++) {
    rows.load_head(head);
    for (int64_t sample = 0; sample < p.rows; sample++) {
      const Queries<S> queries(rows, sample);
      Softmax<S> softmax;
      if (p.some_off[sample]) attend<true>(rows, queries, softmax);
      else attend<false>(rows, queries, softmax);
      S buffer[R];
      const RowReader<S> reader{p.teacher, row_offset(p.teacher, sample)};
      const S* z = reader.get(rows.first, n, buffer);
      S* out = (S*)p.out + sample * p.classes + rows.first;
      const S t = (S)get(p.temperature, sample);
      for (int r = 0; r < n; r++) {
        const S attended = t * (rows.u * softmax.mean_s[r] + softmax.mean_v[r]);
        const S before = head > 0 ? out[r] : p.residual ? z[r] : S(0);
        out[r] = queries.soft[rows.first + r] <= floor_of<S> ? S(-__builtin_inf()) : before + attended;
        if (!p.stats) continue;
        const int64_t i = rows.first + r;
        stat<S>(p, 0, head, sample)[i] = softmax.shift[r];
        stat<S>(p, 1, head, sample)[i] = softmax.total[r];
        stat<S>(p, 2, head, sample)[i] = softmax.mean_s[r];
        stat<S>(p, 3, head, sample)[i] = softmax.mean_v[r];
      }
    }
  }
}

// What the forward found for R queries, and how much of each reaches the loss.
template <class S>
struct Saved {
  S shift[R], centre[R], weight[R], mean_s[R];  // centre: o; weight: upstream / sum of exp
  double upstream[R];

  Saved(const ScoreRows<S>& rows, const Queries<S>& q, int64_t head, int64_t sample) {
    const ClassAttention& p = rows.p;
    const double t = get(p.temperature, sample);
    const S* g = (const S*)p.upstream + sample * p.classes;
    for (int r = 0; r < R; r++) {
      const int64_t i = rows.row(r);
      const bool counts = rows.exists(r) && !(q.soft[i] <= floor_of<S>);
      shift[r] = stat<S>(p, 0, head, sample)[i];
      mean_s[r] = stat<S>(p, 2, head, sample)[i];
      centre[r] = rows.u * mean_s[r] + stat<S>(p, 3, head, sample)[i];
      upstream[r] = counts ? g[i] * t : 0;
      weight[r] = counts ? (S)(upstream[r] / stat<S>(p, 1, head, sample)[i]) : S(0);
    }
  }
};

// The gradients that R rows of scores receive from the samples.
template <class S>
struct Received {
  const int64_t width;
  Buffer<S> buffer{(R + 2) * width};
  S* const pairs = buffer.data;
  S* const by_key = pairs + R * width;
  S* const values = by_key + width;
  double a, u, c[R];

  explicit Received(int64_t width) : width(width) {}
  void zero() {
    for (int64_t j = 0; j < (R + 2) * width; j++) pairs[j] = 0;
    a = u = 0;
    for (int r = 0; r < R; r++) c[r] = 0;
  }
};

template <bool some_off, class S>
void receive(const ScoreRows<S>& rows, const Queries<S>& q, const Saved<S>& saved, Received<S>& to) {
  using V = typename VectorOf<S>::V;
  V by_query[R]{};
  for (int64_t j = 0; j < rows.width; j += Lanes<V>::count) {
    const Keys<some_off, V, S> keys(q.soft, rows.by_key, j);
    const V value = keys.s * rows.u + load<V>(rows.values + j);
    V by_key = load<V>(to.by_key + j), by_value = load<V>(to.values + j);
    for (int r = 0; r < R; r++) {
      const V x = keys.score(rows.pairs + r * rows.width + j, q.s[r], q.slope[r]);
      const V p = exp_at_rate(x - saved.shift[r], S(1)) * saved.weight[r];
      const V grad = p * (value - saved.centre[r]);  // of the score
      S* pairs = to.pairs + r * rows.width + j;
      store(pairs, load<V>(pairs) + grad);
      by_query[r] += grad * keys.s;
      by_key += grad * q.s[r];
      by_value += p;
    }
    store(to.by_key + j, by_key), store(to.values + j, by_value);
  }
  for (int r = 0; r < R; r++) {
    const double grad = sum(by_query[r]);
    to.c[r] += grad, to.a += grad * q.s[r];
    to.u += saved.upstream[r] * saved.mean_s[r];
  }
}

template <class S>
void backward(const ClassAttention& p, int64_t task) {
  ScoreRows<S> rows(p, task * R);
  Received<S> received(rows.width);
  const int64_t n = p.classes + 1;
  for (int64_t head = 0; head < p.heads; head++) {
    rows.load_head(head);
    received.zero();
    for (int64_t sample = 0; sample < p.rows; sample++) {
      const Queries<S> queries(rows, sample);
      const Saved<S> saved(rows, queries, head, sample);
      if (p.some_off[sample]) receive<true>(rows, queries, saved, received);
      else receive<false>(rows, queries, saved, received);
    }
    for (int r = 0; r < R && rows.exists(r); r++) {
      S* grad = (S*)p.grad_scores + (head * n + rows.first + r) * n;
      __builtin_memcpy(grad, received.pairs + r * rows.width, p.classes * sizeof(S));
      grad[p.classes] = (S)received.c[r];
    }
    S* by_key = (S*)p.partial + (task * 2 * p.heads + head) * n;
    S* values = by_key + p.heads * n;
    __builtin_memcpy(by_key, received.by_key, p.classes * sizeof(S));
    __builtin_memcpy(values, received.values, p.classes * sizeof(S));
    by_key[p.classes] = (S)received.a, values[p.classes] = (S)received.u;
  }
}

// Row `which` of (2, H): the last row of a head's scores, or its values.
template <class S>
void collect(const ClassAttention& p, int64_t which) {
  const int64_t n = p.classes + 1, head = which % p.heads;
  S* to = which < p.heads ? (S*)p.grad_scores + (head * n + p.classes) * n
                          : (S*)p.grad_values + head * n;
  for (int64_t j = 0; j < n; j++) {
    double total = 0;
    for (int64_t task = 0; task < row_blocks(p.classes); task++)
      total += ((const S*)p.partial)[(task * 2 * p.heads + which) * n + j];
    to[j] = (S)total;
  }
}

// Adds to `grads` what the softened logits receive as keys, returns it to `by_query` as queries.
template <bool some_off, class S>
void return_to_sample(const ScoreRows<S>& rows, const Queries<S>& q, const Saved<S>& saved, S* grads,
                      S* by_query) {
  using V = typename VectorOf<S>::V;
  const S unit = exp_rate<S>(1), natural = S(1 / (double)unit);
  V total[R]{};
  for (int64_t j = 0; j < rows.width; j += Lanes<V>::count) {
    const Keys<some_off, V, S> keys(q.soft, rows.by_key, j);
    const V value = keys.s * rows.u + load<V>(rows.values + j);
    const V slope = keys.s * rows.a + keys.b * natural;
    V grad_j = load<V>(grads + j);
    for (int r = 0; r < R; r++) {
      const V x = keys.score(rows.pairs + r * rows.width + j, q.s[r], q.slope[r]);
      const V p = exp_at_rate(x - saved.shift[r], S(1)) * saved.weight[r];
      const V grad = p * (value - saved.centre[r]);
      total[r] += grad * slope;
      grad_j += grad * (q.slope[r] * natural) + p * rows.u;
    }
    store(grads + j, grad_j);
  }
  for (int r = 0; r < R; r++) by_query[r] = sum(total[r]);
}

template <class S>
void teacher(const ClassAttention& p, int64_t sample) {
  const int64_t width = padded(p.classes);
  Buffer<S> grads(width);
  for (int64_t j = 0; j < width; j++) grads.data[j] = 0;
  double direct = 0, through = 0;  // to the temperature: as a factor of o, and as divisor of s
  for (int64_t first = 0; first < p.classes; first += R) {
    ScoreRows<S> rows(p, first);
    for (int64_t head = 0; head < p.heads; head++) {
      rows.load_head(head);
      const Queries<S> queries(rows, sample);
      const Saved<S> saved(rows, queries, head, sample);
      S by_query[R];
      if (p.some_off[sample]) return_to_sample<true>(rows, queries, saved, grads.data, by_query);
      else return_to_sample<false>(rows, queries, saved, grads.data, by_query);
      for (int r = 0; r < R && rows.exists(r); r++) {
        grads.data[first + r] += by_query[r];
        direct += saved.upstream[r] * saved.centre[r];
      }
    }
  }
  const double inverse = 1 / get(p.temperature, sample);
  const S* soft = (const S*)p.soft + sample * width;
  const S* upstream = (const S*)p.upstream + sample * p.classes;
  for (int64_t j = 0; j < p.classes; j++) {
    const bool on = !(soft[j] <= floor_of<S>);
    if (on) through += (double)soft[j] * grads.data[j];
    grads.data[j] =
        on ? (S)(grads.data[j] * inverse) + (p.residual ? upstream[j] : S(0)) : S(0);
  }
  if (p.grad_temperature) p.grad_temperature[sample] = (direct - through) * inverse;
  const RowWriter<S> out(p.grad_teacher, sample, true);
  if (out.wanted()) out.flush(0, (int)p.classes, grads.data);
}

template <class S>
void soften(const ClassAttention& p, int64_t sample) {
  const int64_t width = padded(p.classes);
  S* soft = (S*)p.soft + sample * width;
  const S inverse = (S)(1 / get(p.temperature, sample));
  const RowReader<S> reader{p.teacher, row_offset(p.teacher, sample)};
  bool some_off = false;
  S buffer[block];
  for_blocks(p.classes, [&](int64_t first, int n) {
    const S* z = reader.get(first, n, buffer);
    for (int i = 0; i < n; i++) {
      some_off |= z[i] <= floor_of<S>;
      soft[first + i] = z[i] <= floor_of<S> ? floor_of<S> : z[i] * inverse;
    }
  });
  for (int64_t j = p.classes; j < width; j++) soft[j] = 0;
  p.some_off[sample] = some_off;
}

template <class S>
void step(const ClassAttention& p, AttentionStep step, int64_t task) {
  switch (step) {
    case AttentionStep::soften: return soften<S>(p, task);
    case AttentionStep::forward: return forward<S>(p, task);
    case AttentionStep::backward: return backward<S>(p, task);
    case AttentionStep::collect: return collect<S>(p, task);
    case AttentionStep::teacher: return teacher<S>(p, task);
  }
}

void attention(const ClassAttention& p, AttentionStep which, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; task++) {
    if (p.in_double) step<double>(p, which, task);
    else step<float>(p, which, task);
  }
}

}  // namespace KD_ISA
}  // namespace kd
