// SPDX-License-Identifier: Apache-2.0
// DIST: Pearson correlations of the two softmaxes along rows and along columns, and the gradients.
//
//   measure  per tile of rows: their softmaxes and correlations, and the tile's column moments
//   merge    the tiles' moments in their order: column correlations and gradient coefficients
//   emit     the gradients: dist_emit.h
//
// The logits are read from memory once and every gradient written once; the probabilities between
// are kept where a cache holds them, and computed again from the logits where it does not (fp32,
// loss and student gradient: 20 bytes an element then).
//
// Sums are taken of differences that are exactly 0 for constant rows and columns: columns are
// measured from the mean of the tile's first rows. Few terms are summed in a lane; what is added
// after that, and the correlations, are in double.
// Included inside an ISA level's namespace.

// Rows of [begin, end) that take part.
inline int64_t counted_in(const DistParams& p, int64_t begin, int64_t end) {
  if (!p.mask) return end - begin;
  int64_t n = 0;
  for (int64_t i = begin; i < end; i++) n += p.mask[i] != 0;
  return n;
}

template <class T>
struct Pearson {
  T correlation, x, y_s, y_t;
};
// From the centred sums of squares and products: d correlation / d s = x t - y_s s. Of a double or
// of a vector of them.
template <class T>
KD_FN Pearson<T> pearson(T ss, T tt, T st, bool clamp) {
  const T s = root(ss), t = root(tt), eps = T{} + dist_eps;
  const T low_s = clamp ? select(s < eps, eps, s) : s, low_t = clamp ? select(t < eps, eps, t) : t;
  const T product = clamp ? low_s * low_t : s * t + eps;
  const T correlation = st / product, slope = correlation / product;
  // d product / d s = s-hat t, less where a norm is clamped; at a norm of 0 the subgradient 0.
  return {correlation, 1 / product,
          select((s > T{}) & (low_s == s), slope * low_t / s, T{}),
          select((t > T{}) & (low_t == t), slope * low_s / t, T{})};
}

// What makes probabilities of a row's exponentials. The mean is that of the rounded ones: exactly
// what each of a constant row is.
template <class S>
struct Softmax {
  S max, inverse, mean;
  Softmax() = default;
  Softmax(S max, double total, int64_t classes) : max(max) {
    if (!(max > floor_of<S>)) total = __builtin_nan("");  // no finite class
    inverse = S(1 / total), mean = S(total * inverse / classes);
  }
};

// A tile's probabilities and column moments, and where they are.
template <class S>
struct DistTile {
  const DistParams& p;
  int64_t begin;  // its first row, at s and t
  S *s, *t, *moments;
  S max_s, max_t;  // of the row that comes next
  S* student(int64_t i) const { return s + (i - begin) * dist_stride(p); }
  S* teacher(int64_t i) const { return t + (i - begin) * dist_stride(p); }
};

// Writes both exponentials of row i. Meanwhile the maxima of row `next` are found: the wait for its
// logits costs nothing beside so much arithmetic.
template <class S>
void exponentiate(DistTile<S>& tile, int64_t i, int64_t next, S rate, Softmax<S>& of_s,
                  Softmax<S>& of_t) {
  using V = typename VectorOf<S>::V;
  const DistParams& p = tile.p;
  alignas(64) S scratch[4][block];
  const auto student = [&](int64_t k) { return RowReader<S>{p.student, row_offset(p.student, k)}; };
  const auto teacher = [&](int64_t k) { return RowReader<S>{p.teacher, row_offset(p.teacher, k)}; };
  const S max_s = tile.max_s, max_t = tile.max_t;
  double total_s = 0, total_t = 0;
  V next_s = all<V>(floor_of<S>), next_t = next_s;
  for (int64_t first = 0; first < p.classes; first += block) {
    const int n = p.classes - first < block ? (int)(p.classes - first) : block;
    const S* const z_s = student(i).get(first, n, scratch[0]);
    const S* const z_t = teacher(i).get(first, n, scratch[1]);
    const S* const ahead_s = student(next).get(first, n, scratch[2]);
    const S* const ahead_t = teacher(next).get(first, n, scratch[3]);
    S *const s = tile.student(i) + first, *const t = tile.teacher(i) + first;
    V sum_s{}, sum_t{};
    sweep<V>(n, [&](int k, auto w) {
      const V e_s = exp_at_rate(read_logits<V>(z_s + k, w) - max_s, rate);
      const V e_t = exp_at_rate(read_logits<V>(z_t + k, w) - max_t, rate);
      next_s = at_least(read<V>(ahead_s + k, w, floor_of<S>), next_s);
      next_t = at_least(read<V>(ahead_t + k, w, floor_of<S>), next_t);
      write<V>(s + k, w, e_s), write<V>(t + k, w, e_t);
      sum_s += e_s, sum_t += e_t;
    });
    total_s += sum(sum_s), total_t += sum(sum_t);
  }
  of_s = {max_s, total_s, p.classes}, of_t = {max_t, total_t, p.classes};
  tile.max_s = largest(next_s), tile.max_t = largest(next_t);
}

// n rows at once, so that the moments are read and written once for them: probabilities,
// correlations, and the columns' moments about the mean of the tile's first n rows.
template <int n, class S>
void measure_rows(DistTile<S>& tile, const int64_t* rows, bool begins, bool ends) {
  using V = typename VectorOf<S>::V;
  const DistParams& p = tile.p;
  const int64_t stride = dist_stride(p);
  const S rate = exp_rate<S>(1 / p.temperature);
  Softmax<S> of_s[n], of_t[n];
  for (int j = 0; j < n; j++)
    exponentiate(tile, rows[j], rows[ends && j + 1 == n ? j : j + 1], rate, of_s[j], of_t[j]);
  double ss[n] = {}, tt[n] = {}, st[n] = {};
  for (int64_t first = 0; first < p.classes; first += block) {
    const int count = p.classes - first < block ? (int)(p.classes - first) : block;
    V row_ss[n]{}, row_tt[n]{}, row_st[n]{};
    S *s[n], *t[n], *const moments = tile.moments + first;
    for (int j = 0; j < n; j++)
      s[j] = tile.student(rows[j]) + first, t[j] = tile.teacher(rows[j]) + first;
    S* const from_s = moments + pivot_s * stride;
    S* const from_t = moments + pivot_t * stride;
    if (begins)
      sweep<V>(count, [&](int k, auto w) {
        const auto mean = [&](S* const* from, const Softmax<S>* of) {
          const V one = rounded(read<V>(from[0] + k, w, S(0)) * of[0].inverse);
          V more{};
          for (int j = 1; j < n; j++)
            more += rounded(read<V>(from[j] + k, w, S(0)) * of[j].inverse) - one;
          return one + more * S(1. / n);
        };
        write<V>(from_s + k, w, mean(s, of_s)), write<V>(from_t + k, w, mean(t, of_t));
      });
    sweep<V>(count, [&](int k, auto w) {
      V column[dist_sums];
      const V first_s = read<V>(from_s + k, w, S(0)), first_t = read<V>(from_t + k, w, S(0));
      for (int m = 0; m < dist_sums; m++)
        column[m] = read<V>(moments + m * stride + k, w, S(0));
#pragma GCC unroll 4
      for (int j = 0; j < n; j++) {
        const V a = rounded(read<V>(s[j] + k, w, S(0)) * of_s[j].inverse);
        const V b = rounded(read<V>(t[j] + k, w, S(0)) * of_t[j].inverse);
        write<V>(s[j] + k, w, a), write<V>(t[j] + k, w, b);
        const V ds = within(a - of_s[j].mean, w), dt = within(b - of_t[j].mean, w);
        row_ss[j] += ds * ds, row_tt[j] += dt * dt, row_st[j] += ds * dt;
        const V es = a - first_s, et = b - first_t;
        column[mean_s] += es, column[mean_t] += et;
        column[sum_ss] += es * es, column[sum_tt] += et * et, column[sum_st] += es * et;
      }
      for (int m = 0; m < dist_sums; m++) write<V>(moments + m * stride + k, w, column[m]);
    });
    for (int j = 0; j < n; j++)
      ss[j] += sum(row_ss[j]), tt[j] += sum(row_tt[j]), st[j] += sum(row_st[j]);
  }
  const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.beta / p.counted;
  for (int j = 0; j < n; j++) {
    const auto r = pearson(ss[j], tt[j], st[j], p.clamp);
    p.row[rows[j]] = {of_s[j].max, of_t[j].max, of_s[j].inverse, of_t[j].inverse, of_s[j].mean,
                      of_t[j].mean, -weight * r.x, -weight * r.y_s, -weight * r.y_t,
                      weight * (1 - r.correlation), 0};
  }
}

// Rows [begin, end), at most a tile. What the pivot's distance from the mean adds to a sum of
// squares, and takes from it here, is at most a few times that sum, since it is a mean of theirs.
template <class S>
void measure_tile(const DistParams& p, int64_t begin, int64_t end, S* s, S* t) {
  using V = typename VectorOf<S>::V;
  constexpr int together = 4;
  const int64_t stride = dist_stride(p);
  S* const moments = (S*)p.moments + begin / dist_tile * dist_moments * stride;
  int64_t rows[dist_tile];
  int counted = 0;
  for (int64_t i = begin; i < end; i++)
    if (!p.mask || p.mask[i]) rows[counted++] = i;
  if (!counted) return;
  __builtin_memset(moments, 0, dist_moments * stride * sizeof(S));
  const auto top = [&](const Rows& of) {
    return largest_of(RowReader<S>{of, row_offset(of, rows[0])}, p.classes);
  };
  DistTile<S> tile{p, begin, s, t, moments, top(p.student), top(p.teacher)};
  int k = 0;
  for (; k + together <= counted; k += together)
    measure_rows<together>(tile, rows + k, k == 0, k + together == counted);
  for (; k < counted; k++) measure_rows<1>(tile, rows + k, k == 0, k + 1 == counted);

  const S share = S(1. / counted);
  const auto at = [&](int m) { return moments + m * stride; };
  sweep<V>(p.classes, [&](int i, auto w) {
    const V of_s = read<V>(at(mean_s) + i, w, S(0)), of_t = read<V>(at(mean_t) + i, w, S(0));
    const V centre_s = of_s * share, centre_t = of_t * share;
    write<V>(at(mean_s) + i, w, read<V>(at(pivot_s) + i, w, S(0)) + centre_s);
    write<V>(at(mean_t) + i, w, read<V>(at(pivot_t) + i, w, S(0)) + centre_t);
    write<V>(at(sum_ss) + i, w, read<V>(at(sum_ss) + i, w, S(0)) - of_s * centre_s);
    write<V>(at(sum_tt) + i, w, read<V>(at(sum_tt) + i, w, S(0)) - of_t * centre_t);
    write<V>(at(sum_st) + i, w, read<V>(at(sum_st) + i, w, S(0)) - of_s * centre_t);
  });
}

template <class S>
void measure_block(const DistParams& p, int64_t b) {
  const int64_t stride = dist_stride(p), size = dist_block_rows(p.rows, p.classes);
  const int64_t begin = b * size, end = begin + size < p.rows ? begin + size : p.rows;
  void* const own = p.soft ? nullptr : __builtin_malloc(2 * dist_tile * stride * sizeof(S));
  for (int64_t i = begin; i < end; i += dist_tile) {
    S* const s = p.soft ? (S*)p.soft + i * stride : (S*)own;
    S* const t = s + (p.soft ? p.rows : dist_tile) * stride;
    measure_tile(p, i, i + dist_tile < end ? i + dist_tile : end, s, t);
  }
  __builtin_free(own);
}

// The columns of one task: all tiles' moments in their order.
template <class S>
void merge_columns(const DistParams& p, int64_t task) {
  constexpr int most = 128;
  const int64_t c = p.classes, stride = dist_stride(p), size = dist_task_columns(c);
  const int64_t begin = task * size, end = begin + size < c ? begin + size : c;
  const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.gamma / c;
  S* const out = (S*)p.columns;
  double total = 0;
  for (int64_t first = begin; first < end; first += most) {
    const int n = end - first < most ? (int)(end - first) : most;
    alignas(64) double s[most] = {}, t[most] = {}, ss[most] = {}, tt[most] = {}, st[most] = {};
    int64_t counted = 0;
    for (int64_t row = 0; row < p.rows; row += dist_tile) {
      const int64_t own = counted_in(p, row, row + dist_tile < p.rows ? row + dist_tile : p.rows);
      if (!own) continue;
      const S* m = (const S*)p.moments + row / dist_tile * dist_moments * stride + first;
      const double share = (double)own / (counted + own), cross = counted * share;
      counted += own;
      for (int k = 0; k < n; k++) {
        const double ds = m[mean_s * stride + k] - s[k], dt = m[mean_t * stride + k] - t[k];
        s[k] += ds * share, t[k] += dt * share;
        ss[k] += m[sum_ss * stride + k] + ds * ds * cross;
        tt[k] += m[sum_tt * stride + k] + dt * dt * cross;
        st[k] += m[sum_st * stride + k] + ds * dt * cross;
      }
    }
    alignas(64) double loss[most], x[most], y_s[most], y_t[most];
    for (int k = 0; k < n; k += Lanes<vd>::count) {
      const auto r = pearson(load<vd>(ss + k), load<vd>(tt + k), load<vd>(st + k), p.clamp);
      store<vd>(loss + k, weight * (1 - r.correlation)), store<vd>(x + k, -weight * r.x);
      store<vd>(y_s + k, -weight * r.y_s), store<vd>(y_t + k, -weight * r.y_t);
    }
    for (int k = 0; k < n; k++) {
      total += loss[k];
      S* const to = out + first + k;
      to[centre_s * stride] = S(s[k]), to[centre_t * stride] = S(t[k]);
      to[column_x * stride] = S(x[k]);
      to[column_y_s * stride] = S(y_s[k]), to[column_y_t * stride] = S(y_t[k]);
    }
  }
  p.column_loss[task] = total;
}
