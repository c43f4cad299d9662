// SPDX-License-Identifier: Apache-2.0
// Samples attend to samples: the rows between the products (see kd/row_attention.h). Each step
// reads and writes its row once, the softmax in cache. Included inside an ISA level's namespace.

// Calls body(first, n, logits, off) for blocks of a row of the teacher's.
template <class S, class Body>
KD_FN void for_logits(const RowAttention& p, int64_t row, const Body& body) {
  const RowReader<S> reader{p.teacher, row_offset(p.teacher, row)};
  S buffer[block];
  for_blocks(p.classes, [&](int64_t first, int n) { body(first, n, reader.get(first, n, buffer)); });
}

template <class S>
bool is_off(S z) { return z == -(S)__builtin_inf(); }

template <class S>
void soften_row(const RowAttention& p, int64_t row) {
  const S inverse = (S)(1 / get(p.temperature, row));
  S* const soft = (S*)p.soft + row * p.classes;
  S* const out = p.out ? (S*)p.out + row * p.classes : nullptr;
  for_logits<S>(p, row, [&](int64_t first, int n, const S* z) {
    for (int i = 0; i < n; i++) soft[first + i] = is_off(z[i]) ? S(0) : z[i] * inverse;
    if (!out) return;
    for (int i = 0; i < n; i++) out[first + i] = p.residual || is_off(z[i]) ? z[i] : S(0);
  });
}

template <class S>
void softmax_row(const RowAttention& p, int64_t row) {
  using V = typename VectorOf<S>::V;
  S* const x = (S*)p.scores + row * p.others;
  const int n = (int)p.others;
  const S some = x[0], rate = exp_rate<S>(1);
  V top = all<V>(some), total{};
  sweep<V>(n, [&](int i, auto w) { top = at_least(read<V>(x + i, w, some), top); });
  const S shift = largest(top);
  sweep<V>(n, [&](int i, auto w) {
    const V drop = at_least(read<V>(x + i, w, some) - shift, all<V>(floor_of<S>));
    write(x + i, w, exp_at_rate(drop, rate));
    total += read<V>(x + i, w, S(0));
  });
  const S inverse = 1 / sum(total);
  sweep<V>(n, [&](int i, auto w) { write(x + i, w, read<V>(x + i, w, S(0)) * inverse); });
}

template <class S>
void arrive_row(const RowAttention& p, int64_t row) {
  const S t = (S)get(p.temperature, row);
  const S* const upstream = (const S*)p.upstream + row * p.classes;
  S* const to = (S*)p.arriving + row * p.classes;
  for_logits<S>(p, row, [&](int64_t first, int n, const S* z) {
    for (int i = 0; i < n; i++) to[first + i] = is_off(z[i]) ? S(0) : upstream[first + i] * t;
  });
}

template <class S>
void score_row(const RowAttention& p, int64_t row) {
  using V = typename VectorOf<S>::V;
  const S* const probability = (const S*)p.scores + row * p.others;
  S* const x = (S*)p.to_scores + row * p.others;
  const int n = (int)p.others;
  V dots{};
  sweep<V>(n, [&](int i, auto w) {
    dots += read<V>(probability + i, w, S(0)) * read<V>(x + i, w, S(0));
  });
  const S mean = sum(dots);
  sweep<V>(n, [&](int i, auto w) {
    write(x + i, w, read<V>(probability + i, w, S(0)) * (read<V>(x + i, w, S(0)) - mean));
  });
}

template <class S>
void teacher_row(const RowAttention& p, int64_t row) {
  const double inverse = 1 / get(p.temperature, row);
  const S* const upstream = (const S*)p.upstream + row * p.classes;
  const S* const soft = (const S*)p.soft + row * p.classes;
  const S* const to_soft = (const S*)p.to_soft + row * p.classes;
  const RowWriter<S> writer(p.grad_teacher, row, true);
  double through = 0;  // to the temperature, as divisor of the logits
  S grad[block];
  for_logits<S>(p, row, [&](int64_t first, int n, const S* z) {
    for (int i = 0; i < n; i++) {
      const bool off = is_off(z[i]);
      const S through_soft = off ? S(0) : to_soft[first + i];
      through += (double)soft[first + i] * through_soft;
      const S direct = p.residual && !off ? upstream[first + i] : S(0);
      grad[i] = through_soft * (S)inverse + direct;
    }
    if (writer.wanted()) writer.flush(first, n, grad);
  });
  if (!p.grad_temperature) return;
  double direct = 0;  // as factor
  for (int64_t j = row * p.width; j < (row + 1) * p.width; j++)
    direct += (double)((const S*)p.attended)[j] * ((const S*)p.to_attended)[j];
  p.grad_temperature[row] = (direct - through) * inverse;
}

template <class S>
void row_step(const RowAttention& p, RowStep step, int64_t row) {
  switch (step) {
    case RowStep::soften: return soften_row<S>(p, row);
    case RowStep::softmax: return softmax_row<S>(p, row);
    case RowStep::arrive: return arrive_row<S>(p, row);
    case RowStep::score: return score_row<S>(p, row);
    case RowStep::teacher: return teacher_row<S>(p, row);
  }
}

void row_attention(const RowAttention& p, RowStep which, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    if (p.in_double) row_step<double>(p, which, row);
    else row_step<float>(p, which, row);
  }
}
