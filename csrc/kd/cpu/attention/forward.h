// SPDX-License-Identifier: Apache-2.0
// Per row of scores and sample a sweep for the largest score and one for the sums. Included inside an
// ISA level's namespace.

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
