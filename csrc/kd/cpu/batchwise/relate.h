// SPDX-License-Identifier: Apache-2.0
// MLKD's relations at one temperature: Gram matrices, loss and gradients. Samples and classes that
// are not selected are left out before the products, where a library's would multiply by 0: with
// medians that is three fifths of the work. Included inside an ISA level's namespace.
//
// Gram matrices are of the smaller side of P = p_s and D = p_s - p_t, turned if there are more
// samples than classes; "near" are the relations along that side, "far" those along the other. With
// F = P P' - Q Q', the near ones are ||F||^2; the far ones ||P' P - Q' Q||^2 =
// 2 (<D D', M M'> + tr (M D')^2), M = P - D / 2. All is of the order of D, so that close
// distributions do not cancel. Z has the rows of P, then those of D: Z D' are the Gram matrices,
// and the gradients products (coefficients of P, of D) Z.

template <class S>
struct Relation {
  const MlkdRelations& p;
  Matrix<S> z_near, z_far, gram_near, gram_far, square, slope_near, slope_far, of_far;
  int64_t step, stride;  // from one number of the smaller side to the next, and of the other

  explicit Relation(const MlkdRelations& p) : p(p) {
    const bool wide = p.rows <= p.classes;
    step = wide ? p.classes : 1, stride = wide ? 1 : p.classes;
    S* free = (S*)p.memory;
    const auto matrix = [&](int64_t rows, int64_t columns) {
      const Matrix<S> m{free, rows, columns, relation_stride(columns)};
      free += rows * m.stride;
      return m;
    };
    const int64_t n = p.n_far ? p.size : 0;
    gram_near = matrix(2 * p.n_near, p.n_near), slope_near = matrix(p.n_near, 2 * p.n_near);
    gram_far = matrix(2 * n, n), square = matrix(n, n), slope_far = matrix(n, 2 * n);
    z_near = matrix(2 * p.n_near, p.depth), of_far = matrix(p.selected ? n : 0, p.n_far);
    z_far = matrix(p.gathered ? 2 * n : 0, p.n_far);
    if (!p.gathered) z_far = {(S*)soft(0), 2 * n, p.n_far, p.classes};
    if (!p.of_teacher) slope_near.columns = p.n_near;  // and none of D
  }
  const S* soft(int64_t of_d) const {
    return (const S*)p.soft + (2 * p.temperature + of_d) * p.rows * p.classes;
  }
  static int part(int64_t columns, int64_t first) {
    return columns - first < panel ? (int)(columns - first) : panel;
  }

  // Selected rows and columns of P and D side by side.
  void gather(int64_t i) const {
    const bool near = i < z_near.rows;
    const Matrix<S>& to = near ? z_near : z_far;
    if (!near) i -= z_near.rows;
    const int64_t n = to.rows / 2, row = i % n;
    const S* const from = soft(i / n) + (near ? p.near[row] : row) * step;
    if (near || !p.selected) {
      for (int64_t k = 0; k < to.columns; k++) to.row(i)[k] = from[k * stride];
    } else {
      for (int64_t k = 0; k < to.columns; k++) to.row(i)[k] = from[p.far[k] * stride];
    }
  }
  // A panel of columns of Z times the transpose of its rows from `other` on.
  void gram(const Matrix<S>& a, const S* other, const Matrix<S>& to, int64_t at) const {
    const int64_t first = at * panel;
    product(a, other + first * a.stride, 1, a.stride, part(to.columns, first), to.data + first,
            to.stride);
  }
  void near_slopes(int64_t i) const {
    const int64_t n = p.n_near;
    const S w = S(4 * p.near_weight);
    S* const to = slope_near.row(i);
    double loss = 0;
    for (int64_t k = 0; k < n; k++) {
      const S e = gram_near.row(i)[k] + gram_near.row(k)[i] - gram_near.row(n + i)[k];
      loss += (double)e * e;
      to[k] = p.of_teacher ? -w * e : w * e;
      if (p.of_teacher) to[n + k] = w * e;
    }
    p.row_loss[i] = p.near_weight * loss;
  }
  // Where all is selected, the near relations' as well: their Gram matrices are the same.
  void far_slopes(int64_t i) const {
    const int64_t n = p.size;
    const S w = S(4 * p.far_weight), w_near = p.selected ? S(0) : S(4 * p.near_weight);
    S* const to = slope_far.row(i);
    double of_near = 0, of_far = 0;
    for (int64_t k = 0; k < n; k++) {
      const S a = gram_far.row(i)[k], b = gram_far.row(k)[i], d = gram_far.row(n + i)[k];
      const S pp = square.row(i)[k], e = a + b - d;
      of_near += (double)e * e;
      of_far += (double)d * (pp - S(0.5) * (a + b) + S(0.25) * d) +
                (double)(a - S(0.5) * d) * (b - S(0.5) * d);
      to[k] = p.of_teacher ? w * (d - a) - w_near * e : w * a + w_near * e;
      to[n + k] = p.of_teacher ? w * (a + b - pp - d) + w_near * e : w * (pp - a);
    }
    p.row_loss[p.n_near + i] =
        (p.selected ? 0 : p.near_weight * of_near) + p.far_weight * 2 * of_far;
  }
  void far_gradient(int64_t at) const {
    const int64_t first = at * panel;
    product(slope_far, z_far.data + first, z_far.stride, 1, part(p.n_far, first),
            of_far.data + first, of_far.stride);
  }
  // A panel of columns of the gradient: near rows, and far columns added to them.
  void gradient(int64_t at) const {
    const int64_t first = at * panel;
    const int n = part(p.depth, first);
    const Matrix<S>& slope = p.selected ? slope_near : slope_far;
    const Matrix<S>& z = p.selected ? z_near : z_far;
    S* const own = (S*)__builtin_malloc((slope.rows + 1) * panel * sizeof(S));
    product(slope, z.data + first, z.stride, 1, n, own, panel);
    int64_t low = 0, high = 0, row = 0;
    if (p.selected)
      for (; high < p.n_far && p.far[high] < first + n; high++) low += p.far[high] < first;
    S* const to = (S*)p.grad + p.temperature * p.rows * p.classes + first * stride;
    for (int64_t i = 0; i < p.size; i++) {
      const bool some = !p.selected || (row < p.n_near && p.near[row] == i);
      const S* const from = own + row * panel;
      row += some;
      for (int k = 0; k < n; k++) to[i * step + k * stride] = some ? from[k] : S(0);
      for (int64_t k = low; k < high; k++)
        to[i * step + (p.far[k] - first) * stride] += of_far.row(i)[k];
    }
    __builtin_free(own);
  }

  void run(RelateStep what, int64_t i) const {
    switch (what) {
      case RelateStep::gather: return gather(i);
      case RelateStep::near_gram: return gram(z_near, z_near.row(p.n_near), gram_near, i);
      case RelateStep::far_gram: return gram(z_far, z_far.row(p.size), gram_far, i);
      case RelateStep::far_square:
        return gram({z_far.data, p.size, z_far.columns, z_far.stride}, z_far.data, square, i);
      case RelateStep::slopes:
        return i < p.n_near ? near_slopes(i) : far_slopes(i - p.n_near);
      case RelateStep::far_gradient: return far_gradient(i);
      case RelateStep::gradient: return gradient(i);
    }
  }
};
