// SPDX-License-Identifier: Apache-2.0
// Gram matrices of maps, from torch's products to the matrices whose products are the gradients. A
// task is a sample's, in two walks over its rows; what the second reads again is in L2.
// Included inside an ISA level's namespace.

constexpr double least_norm = 1e-12;  // of torch.nn.functional.normalize

template <class S>
KD_FN S norm_of(const S* row, int64_t n, int64_t kind) {
  using V = typename VectorOf<S>::V;
  V sums{};
  sweep<V>((int)n, [&](int i, auto w) {
    const V x = read<V>(row + i, w, S(0));
    sums += kind == 1 ? magnitude(x) : x * x;
  });
  return kind == 1 ? sum(sums) : S(__builtin_sqrt(sum(sums)));
}
template <class V>
KD_FN V sign_of(V x) {
  return select(x > V{}, all<V>(1), select(x < V{}, all<V>(-1), V{}));
}

// D = a G - b H, rows of G and H over their norms: its squares, or its rows' norms.
template <class S>
struct Match {
  using V = typename VectorOf<S>::V;
  const GramMatch& p;
  const S* gram[2];
  // Of every row: what multiplies it, sum D G-hat (what normalising takes off), and what its slopes
  // are multiplied by.
  S *weight[2], *along[2], *slope;

  void measure(double& loss) const {
    for (int64_t i = 0; i < p.rows; i++) {
      const S* row[2] = {gram[0] + i * p.columns, gram[1] + i * p.columns};
      bool moves[2];
      for (int side = 0; side < 2; side++) {
        const S norm = p.choices.norm ? norm_of(row[side], p.columns, p.choices.norm) : S(1);
        moves[side] = p.choices.norm && norm > S(least_norm);
        weight[side][i] = S(p.numbers.scale[side]) / (norm > S(least_norm) ? norm : S(least_norm));
      }
      V squares{}, inner[2] = {};
      sweep<V>((int)p.columns, [&](int k, auto w) {
        const V s = read<V>(row[0] + k, w, S(0)) * weight[0][i];
        const V t = read<V>(row[1] + k, w, S(0)) * weight[1][i], d = s - t;
        squares += d * d, inner[0] += d * s, inner[1] += d * t;
      });
      const double square = sum(squares), norm = __builtin_sqrt(square);
      loss += p.choices.distance ? norm : square;
      slope[i] = S(p.factor * (!p.choices.distance ? 2 : norm > 0 ? 1 / norm : 0));
      for (int side = 0; side < 2; side++) along[side][i] = moves[side] ? sum(inner[side]) : S(0);
    }
  }

  // Gradients of entries whose row has these numbers.
  template <int side, class W>
  KD_FN V gradient(V s, V t, W w_s, W w_t, W a, W rate) const {
    const V d = s * w_s - t * w_t, g = side ? t : s;
    const V unit = p.choices.norm == 1 ? sign_of(g) : g * (side ? w_t : w_s);
    const V slopes = rate * (side ? w_t : w_s) * (d - unit * a);
    return side ? -slopes : slopes;
  }
  template <int side>
  void emit(S* to) const {
    const bool both = p.choices.symmetric;
    for (int64_t i = 0; i < p.rows; i++, to += p.columns)
      sweep<V>((int)p.columns, [&](int k, auto w) {
        const V s = read<V>(gram[0] + i * p.columns + k, w, S(0));
        const V t = read<V>(gram[1] + i * p.columns + k, w, S(0));
        V g = gradient<side>(s, t, weight[0][i], weight[1][i], along[side][i], slope[i]);
        if (both)  // entry (k, i), whose row is k
          g += gradient<side>(s, t, read<V>(weight[0] + k, w, S(0)), read<V>(weight[1] + k, w, S(0)),
                              read<V>(along[side] + k, w, S(0)), read<V>(slope + k, w, S(0)));
        write<V>(to + k, w, g);
      });
  }
};

template <class S>
void match(const GramMatch& p, int64_t m) {
  const int64_t size = p.rows * p.columns;
  S* const memory = (S*)__builtin_malloc(5 * p.rows * sizeof(S) + 1);
  S* const of[5] = {memory, memory + p.rows, memory + 2 * p.rows, memory + 3 * p.rows,
                    memory + 4 * p.rows};
  const Match<S> pair{p, {(const S*)p.student + m * size, (const S*)p.teacher + m * size},
                      {of[0], of[1]}, {of[2], of[3]}, of[4]};
  double loss = 0;
  pair.measure(loss);
  p.loss[m] = loss;
  if (p.grad_student) pair.template emit<0>((S*)p.grad_student + m * size);
  if (p.grad_teacher) pair.template emit<1>((S*)p.grad_teacher + m * size);
  __builtin_free(memory);
}

// NST by channels: cosines K = G m_i m_j, m = 1 / norm, of all pairs of a sample's channels.
template <class S>
struct NST {
  using V = typename VectorOf<S>::V;
  const NSTGrams& p;
  const S *ss, *st, *tt;
  S *m_s, *m_t;

  static void inverses(const S* gram, int64_t n, S* to) {
    for (int64_t i = 0; i < n; i++) {
      const S norm = S(__builtin_sqrt(gram[i * n + i]));
      to[i] = 1 / (norm > S(least_norm) ? norm : S(least_norm));
    }
  }
  // The sum of a row's squared cosines; and gradients, `rate` K m_i m_j, and squares by column.
  template <class Column>
  KD_FN double row(const S* gram, S own, const S* others, int64_t n, S* to, S rate,
                   const Column& column) const {
    V sums{};
    sweep<V>((int)n, [&](int k, auto w) {
      const V m = read<V>(others + k, w, S(0)) * own, x = read<V>(gram + k, w, S(0)) * m;
      sums += x * x;
      column(k, w, x * x);
      if (to) write<V>(to + k, w, x * m * rate);
    });
    return sum(sums);
  }
};

template <class S>
void nst(const NSTGrams& p, int64_t m) {
  using V = typename VectorOf<S>::V;
  const int64_t c = p.student_channels, d = p.teacher_channels;
  S* const memory = (S*)__builtin_malloc((c + 2 * d) * sizeof(S) + 1);
  const NST<S> x{p, (const S*)p.student + m * c * c, (const S*)p.cross + m * c * d,
                 (const S*)p.teacher + m * d * d, memory, memory + c};
  S* const by_column = memory + c + d;  // of the cross cosines
  x.inverses(x.ss, c, x.m_s), x.inverses(x.tt, d, x.m_t);
  __builtin_memset(by_column, 0, d * sizeof(S));
  const double of_own = p.numbers.student * p.numbers.student;
  const double of_cross = p.numbers.student * p.numbers.teacher;
  const double of_teacher = p.numbers.teacher * p.numbers.teacher;
  S* const to_s = p.grad_student ? (S*)p.grad_student + m * c * c : nullptr;
  S* const to_cross = p.grad_cross ? (S*)p.grad_cross + m * c * d : nullptr;
  const auto ignore = [](int, auto, V) {};
  double loss = 0;
  for (int64_t i = 0; i < c; i++) {
    const double own = x.row(x.ss + i * c, x.m_s[i], x.m_s, c, to_s ? to_s + i * c : nullptr,
                             S(4 * p.factor * of_own), ignore);
    const double cross =
        x.row(x.st + i * d, x.m_s[i], x.m_t, d, to_cross ? to_cross + i * d : nullptr,
              S(-4 * p.factor * of_cross), [&](int k, auto w, V squares) {
                write<V>(by_column + k, w, read<V>(by_column + k, w, S(0)) + squares);
              });
    loss += of_own * own - 2 * of_cross * cross;
    if (to_s && x.m_s[i] < S(1 / least_norm))  // what normalising takes off
      to_s[i * c + i] -=
          S(4 * p.factor * (of_own * own - of_cross * cross)) * x.m_s[i] * x.m_s[i];
  }
  for (int64_t i = 0; i < d; i++)
    loss += of_teacher * x.row(x.tt + i * d, x.m_t[i], x.m_t, d, nullptr, S(0), ignore);
  p.loss[m] = loss;
  if (p.grad_teacher) {
    S* const to = (S*)p.grad_teacher + m * d * d;
    __builtin_memset(to, 0, d * d * sizeof(S));
    for (int64_t k = 0; k < d; k++)
      if (x.m_t[k] < S(1 / least_norm))
        to[k * d + k] = S(4 * p.factor * of_cross) * by_column[k] * x.m_t[k] * x.m_t[k];
  }
  __builtin_free(memory);
}
