// SPDX-License-Identifier: Apache-2.0
// The gradients to the teacher and the temperature, sample by sample. Included inside an ISA level's
// namespace.

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
