// SPDX-License-Identifier: Apache-2.0
// MLKD's relations of a small batch at one temperature: Gram matrices, loss and gradients in one
// task, in L2. Rows and columns that are not selected are left out before the products, where a
// library's would multiply by 0: with medians that is three fifths of the work.
// Algebra and signs as in gram_row (mlkd.h). Included inside an ISA level's namespace.

// The tile (rows, vectors) of A B, or of A B added to C; sizes of rows of B and C are padded.
template <int rows, int vectors, class S>
KD_FN void product_tile(int64_t depth, const S* a, int64_t lda, const S* b, int64_t ldb, S* c,
                        int64_t ldc, bool add) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  V sums[rows][vectors];
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < vectors; v++)
      sums[i][v] = add ? load<V>(c + i * ldc + v * width) : V{};
  for (int64_t k = 0; k < depth; k++)
    for (int v = 0; v < vectors; v++) {
      const V other = load<V>(b + k * ldb + v * width);
      for (int i = 0; i < rows; i++) sums[i][v] += other * a[i * lda + k];
    }
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < vectors; v++) store(c + i * ldc + v * width, sums[i][v]);
}

template <class S>
struct Matrix {
  S* data;
  int64_t rows, columns, stride;  // columns up to the stride are zeros
  S* row(int64_t i) const { return data + i * stride; }
};

template <int rows, class S>
void product_rows(int64_t i, const Matrix<S>& a, const Matrix<S>& b, const Matrix<S>& c, bool add) {
  constexpr int width = Lanes<typename VectorOf<S>::V>::count;
  int64_t j = 0;
  for (; j + 2 * width <= c.stride; j += 2 * width)
    product_tile<rows, 2>(a.columns, a.row(i), a.stride, b.data + j, b.stride, c.row(i) + j,
                          c.stride, add);
  if (j < c.stride)
    product_tile<rows, 1>(a.columns, a.row(i), a.stride, b.data + j, b.stride, c.row(i) + j,
                          c.stride, add);
}

// c = a b, or c += a b.
template <class S>
void product(const Matrix<S>& a, const Matrix<S>& b, const Matrix<S>& c, bool add = false) {
  int64_t i = 0;
  for (; i + 6 <= a.rows; i += 6) product_rows<6>(i, a, b, c, add);
  for (; i + 2 <= a.rows; i += 2) product_rows<2>(i, a, b, c, add);
  if (i < a.rows) product_rows<1>(i, a, b, c, add);
}

template <class S>
struct Relation {
  static constexpr int width = Lanes<typename VectorOf<S>::V>::count;
  char* free;  // 64-byte aligned memory not yet handed out

  static int64_t padded(int64_t n) { return (n + width - 1) / width * width; }
  Matrix<S> matrix(int64_t rows, int64_t columns) {
    const Matrix<S> m{(S*)free, rows, columns, padded(columns)};
    free += rows * m.stride * sizeof(S);
    __builtin_memset(m.data, 0, rows * m.stride * sizeof(S));
    return m;
  }
  // Selected rows and columns of x, whose rows and columns are `row` and `column` numbers apart.
  Matrix<S> selected(const S* x, int64_t row, int64_t column, const int64_t* rows, int64_t n_rows,
                     const int64_t* columns, int64_t n_columns) {
    const Matrix<S> m = matrix(n_rows, n_columns);
    for (int64_t i = 0; i < n_rows; i++)
      for (int64_t k = 0; k < n_columns; k++)
        m.row(i)[k] = x[rows[i] * row + columns[k] * column];
    return m;
  }
  Matrix<S> transposed(const Matrix<S>& x) {
    const Matrix<S> m = matrix(x.columns, x.rows);
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t k = 0; k < x.columns; k++) m.row(k)[i] = x.row(i)[k];
    return m;
  }
  Matrix<S> product_of(const Matrix<S>& a, const Matrix<S>& b) {
    const Matrix<S> m = matrix(a.rows, b.columns);
    product(a, b, m);
    return m;
  }
};

// Numbers that Relation hands out for `n` samples of `f` features, whichever are selected.
inline int64_t relation_size(int64_t n, int64_t f) {
  n += 16, f += 16;
  return 12 * n * f + 11 * n * n;
}

inline int64_t chosen_of(const void* chosen, bool in_double, int64_t n, int64_t* to) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++)
    if (!chosen || (in_double ? ((const double*)chosen)[i] : ((const float*)chosen)[i]) != 0)
      to[count++] = i;
  return count;
}

template <class S>
void relate(const MlkdRelations& p, int64_t j, char* memory) {
  const int64_t size = p.rows * p.classes;
  const S *const probabilities = (const S*)p.soft + 2 * j * size, *const d_all = probabilities + size;
  // Gram matrices are of the smaller side.
  const bool wide = p.rows <= p.classes;
  const int64_t n = wide ? p.rows : p.classes, f = wide ? p.classes : p.rows;
  const int64_t step = wide ? p.classes : 1, stride = wide ? 1 : p.classes;
  const S near_weight = S(wide ? p.row_weight : p.column_weight);
  const S far_weight = S(wide ? p.column_weight : p.row_weight);
  int64_t* near = (int64_t*)memory;
  int64_t *far = near + n, *all_n = far + f, *all_f = all_n + n;
  const int64_t n_near = chosen_of(wide ? p.samples : p.columns, p.in_double, n, near);
  const int64_t n_far = chosen_of(wide ? p.columns : p.samples, p.in_double, f, far);
  chosen_of(nullptr, false, n, all_n), chosen_of(nullptr, false, f, all_f);
  Relation<S> r{memory + (2 * (n + f) * 8 + 63) / 64 * 64};
  double of_near = 0, of_far = 0;

  // What is left out must not hide a NaN, which is everybody's.
  int bad = 0;
  for (int64_t i = 0; i < size; i++) bad |= d_all[i] != d_all[i];
  const S start = bad ? S(__builtin_nan("")) : S(0);
  const auto clear = [&](void* grad) {
    for (int64_t i = 0; grad && i < size; i++) ((S*)grad)[j * size + i] = start;
  };
  clear(p.grad_student), clear(p.grad_teacher);
  if (bad) {
    p.loss[j] = start;
    return;
  }
  const auto add = [&](void* grad, const Matrix<S>& m, const int64_t* rows, const int64_t* columns) {
    S* const to = (S*)grad + j * size;
    for (int64_t i = 0; i < m.rows; i++)
      for (int64_t k = 0; k < m.columns; k++) to[rows[i] * step + columns[k] * stride] += m.row(i)[k];
  };

  if (near_weight != 0) {
    const Matrix<S> x = r.selected(probabilities, step, stride, near, n_near, all_f, f);
    const Matrix<S> d = r.selected(d_all, step, stride, near, n_near, all_f, f);
    const Matrix<S> d_t = r.transposed(d);
    const Matrix<S> xd = r.product_of(x, d_t), dd = r.product_of(d, d_t);
    const Matrix<S> slope = r.matrix(n_near, n_near), minus = r.matrix(n_near, n_near);
    for (int64_t i = 0; i < n_near; i++)
      for (int64_t k = 0; k < n_near; k++) {
        const S e = xd.row(i)[k] + xd.row(k)[i] - dd.row(i)[k];
        of_near += (double)e * e;
        slope.row(i)[k] = 4 * near_weight * e, minus.row(i)[k] = -4 * near_weight * e;
      }
    if (p.grad_student) add(p.grad_student, r.product_of(slope, x), near, all_f);
    if (p.grad_teacher) {
      const Matrix<S> g = r.product_of(minus, x);
      product(slope, d, g, true);
      add(p.grad_teacher, g, near, all_f);
    }
  }
  if (far_weight != 0) {
    const Matrix<S> x = r.selected(probabilities, step, stride, all_n, n, far, n_far);
    const Matrix<S> d = r.selected(d_all, step, stride, all_n, n, far, n_far);
    const Matrix<S> x_t = r.transposed(x), d_t = r.transposed(d);
    const Matrix<S> xd = r.product_of(x, d_t), dd = r.product_of(d, d_t), xx = r.product_of(x, x_t);
    const Matrix<S> by_x = r.matrix(n, n), by_d = r.matrix(n, n);
    const auto gradient = [&](void* grad, const auto& coefficients) {
      if (!grad) return;
      for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < n; k++)
          coefficients(xd.row(i)[k], xd.row(k)[i], dd.row(i)[k], xx.row(i)[k], by_x.row(i)[k],
                       by_d.row(i)[k]);
      const Matrix<S> g = r.product_of(by_x, x);
      product(by_d, d, g, true);
      add(grad, g, all_n, far);
    };
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < n; k++) {
        const S a = xd.row(i)[k], b = xd.row(k)[i], e = dd.row(i)[k];
        of_far += (double)e * (xx.row(i)[k] - S(0.5) * (a + b) + S(0.25) * e) +
                  (double)(a - S(0.5) * e) * (b - S(0.5) * e);
      }
    const S w = 4 * far_weight;
    gradient(p.grad_student, [w](S a, S, S, S square, S& of_x, S& of_d) {
      of_x = w * a, of_d = w * (square - a);
    });
    gradient(p.grad_teacher, [w](S a, S b, S e, S square, S& of_x, S& of_d) {
      of_x = w * (e - a), of_d = w * (a + b - square - e);
    });
  }
  p.loss[j] = near_weight * of_near + far_weight * 2 * of_far;
}
