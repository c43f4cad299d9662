// SPDX-License-Identifier: Apache-2.0
// The same scores again, and the gradients of the coefficients, which a task adds up over the
// samples. Included inside an ISA level's namespace.

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
