// SPDX-License-Identifier: Apache-2.0
// DIST: Pearson correlations of the two softmaxes along rows and along columns, and the gradients.
//
//   measure  per block of rows: their softmaxes and correlations, and the block's column moments
//   merge    the blocks' moments in their order: column correlations and gradient coefficients
//   emit     the gradients
//
// The logits are read from memory once and every gradient written once; the probabilities between
// are kept where a cache holds them, and computed again from the logits where it does not (fp32,
// loss and student gradient: 20 bytes an element then).
//
// Sums are taken of differences that are exactly 0 for constant rows and columns: rows are centred
// as exponentials, whose largest is 1, and columns are measured from the block's first row. Few
// terms are summed in a lane; what is added after that, and the correlations, are in double.
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

// exp((z - max) / temperature) * factor of part of a row, and its sum.
template <class S>
KD_FN double exponentials(const RowReader<S>& row, int64_t first, int n, S max, S rate, S factor,
                          S* scratch, S* out) {
  using V = typename VectorOf<S>::V;
  const S* z = row.get(first, n, scratch);
  V sums{};
  sweep<V>(n, [&](int i, auto w) {
    const V e = exp_at_rate(read_logits<V>(z + i, w) - max, rate) * factor;
    write<V>(out + i, w, e);
    sums += e;
  });
  return sum(sums);
}

// A row's statistics, and its probabilities.
template <class S>
void measure_row(const DistParams& p, int64_t i, S* s, S* t) {
  using V = typename VectorOf<S>::V;
  const int64_t c = p.classes;
  const RowReader<S> student{p.student, row_offset(p.student, i)};
  const RowReader<S> teacher{p.teacher, row_offset(p.teacher, i)};
  const S max_s = largest_of(student, c), max_t = largest_of(teacher, c);
  const S rate = exp_rate<S>(1 / p.temperature);
  alignas(64) S scratch[block];
  double total_s = 0, total_t = 0;
  for_blocks(c, [&](int64_t first, int n) {
    total_s += exponentials<S>(student, first, n, max_s, rate, S(1), scratch, s + first);
    total_t += exponentials<S>(teacher, first, n, max_t, rate, S(1), scratch, t + first);
  });
  if (!(max_s > floor_of<S>)) total_s = __builtin_nan("");  // no finite class
  if (!(max_t > floor_of<S>)) total_t = __builtin_nan("");
  const S inverse_s = S(1 / total_s), inverse_t = S(1 / total_t);
  const S mean_s = S(total_s / c), mean_t = S(total_t / c);
  double ss = 0, tt = 0, st = 0;
  for_blocks(c, [&](int64_t first, int n) {
    S *const to_s = s + first, *const to_t = t + first;
    V sum_ss{}, sum_tt{}, sum_st{};
    sweep<V>(n, [&](int k, auto w) {
      const V a = read<V>(to_s + k, w, mean_s), b = read<V>(to_t + k, w, mean_t);
      const V ds = a - mean_s, dt = b - mean_t;
      sum_ss += ds * ds, sum_tt += dt * dt, sum_st += ds * dt;
      write<V>(to_s + k, w, a * inverse_s), write<V>(to_t + k, w, b * inverse_t);
    });
    ss += sum(sum_ss), tt += sum(sum_tt), st += sum(sum_st);
  });
  const double i_s = inverse_s, i_t = inverse_t;
  const auto r = pearson(ss * i_s * i_s, tt * i_t * i_t, st * i_s * i_t, p.clamp);
  const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.beta / p.counted;
  p.row[i] = {max_s, max_t, i_s, i_t, mean_s, mean_t,
              -weight * r.x, -weight * r.y_s, -weight * r.y_t, weight * (1 - r.correlation), 0};
}

// The moments of the columns of rows [begin, end), whose probabilities are at s and t.
template <class S>
void measure_columns(const DistParams& p, int64_t begin, int64_t end, const S* s, const S* t) {
  using V = typename VectorOf<S>::V;
  constexpr int64_t few = 32;  // rows whose terms are summed before they are added to the others'
  const int64_t c = p.classes, stride = dist_stride(p), counted = counted_in(p, begin, end);
  if (!counted) return;
  int64_t pivot = begin;
  while (p.mask && !p.mask[pivot]) pivot++;
  pivot = (pivot - begin) * stride;
  S* const moments = (S*)p.moments + begin / dist_block_rows(p.rows, c) * dist_moments * stride;
  const S share = S(1. / counted);
  const auto each = [&](const auto& body, const auto& few_done) {
    for (int64_t first = begin; first < end; first += few) {
      const int64_t last = first + few < end ? first + few : end;
      for (int64_t i = first; i < last; i++)
        if (!p.mask || p.mask[i]) body((i - begin) * stride);
      few_done();
    }
  };
  sweep<V>(c, [&](int k, auto w) {
    const V first_s = read<V>(s + pivot + k, w, S(0)), first_t = read<V>(t + pivot + k, w, S(0));
    V of_s{}, of_t{}, total_s{}, total_t{};
    each([&](int64_t at) {
      of_s += read<V>(s + at + k, w, S(0)) - first_s;
      of_t += read<V>(t + at + k, w, S(0)) - first_t;
    }, [&] { total_s += of_s, total_t += of_t, of_s = of_t = V{}; });
    const V centre_s = first_s + total_s * share, centre_t = first_t + total_t * share;
    V ss{}, tt{}, st{}, total_ss{}, total_tt{}, total_st{};
    each([&](int64_t at) {
      const V ds = read<V>(s + at + k, w, S(0)) - centre_s;
      const V dt = read<V>(t + at + k, w, S(0)) - centre_t;
      ss += ds * ds, tt += dt * dt, st += ds * dt;
    }, [&] { total_ss += ss, total_tt += tt, total_st += st, ss = tt = st = V{}; });
    const V found[dist_moments] = {centre_s, centre_t, total_ss, total_tt, total_st};
    for (int m = 0; m < dist_moments; m++) write<V>(moments + m * stride + k, w, found[m]);
  });
}

template <class S>
void measure_block(const DistParams& p, int64_t b) {
  const int64_t stride = dist_stride(p), size = dist_block_rows(p.rows, p.classes);
  const int64_t begin = b * size, end = begin + size < p.rows ? begin + size : p.rows;
  void* const own = p.soft ? nullptr : __builtin_malloc(2 * (end - begin) * stride * sizeof(S));
  S* const s = p.soft ? (S*)p.soft + begin * stride : (S*)own;
  S* const t = s + (p.soft ? p.rows : end - begin) * stride;
  for (int64_t i = begin; i < end; i++)
    if (!p.mask || p.mask[i]) measure_row(p, i, s + (i - begin) * stride, t + (i - begin) * stride);
  measure_columns(p, begin, end, s, t);
  __builtin_free(own);
}

template <class S>
void merge_columns(const DistParams& p, int64_t begin, int64_t end) {
  constexpr int most = 128;
  const int64_t c = p.classes, stride = dist_stride(p), size = dist_block_rows(p.rows, c);
  const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.gamma / c;
  S* const out = (S*)p.columns;
  for (int64_t first = begin; first < end; first += most) {
    const int n = end - first < most ? (int)(end - first) : most;
    alignas(64) double s[most] = {}, t[most] = {}, ss[most] = {}, tt[most] = {}, st[most] = {};
    int64_t counted = 0;
    for (int64_t row = 0; row < p.rows; row += size) {
      const int64_t own = counted_in(p, row, row + size < p.rows ? row + size : p.rows);
      if (!own) continue;
      const S* m = (const S*)p.moments + row / size * dist_moments * stride + first;
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
      p.column_loss[first + k] = loss[k];
      S* const to = out + first + k;
      to[centre_s * stride] = S(s[k]), to[centre_t * stride] = S(t[k]);
      to[column_x * stride] = S(x[k]);
      to[column_y_s * stride] = S(y_s[k]), to[column_y_t * stride] = S(y_t[k]);
    }
  }
}

// One side of a row: g = d loss / d p, then dz = p (g - sum p g) / temperature. The probabilities
// are read from memory: were they products here, the compiler would fuse them with the subtraction
// of their rounded mean, and constant columns would not be 0.
template <class S>
struct DistSide {
  RowWriter<S> to;
  S x, y, mean_own, mean_other;
  const S *centre_own, *centre_other, *column_x, *column_y;
  double dot = 0;
  S largest_g = 0;

  template <class V, class W>
  KD_FN V gradient(int64_t k, W w, V own, V other) const {
    return (other - mean_other) * x - (own - mean_own) * y +
           (other - read<V>(centre_other + k, w, S(0))) * read<V>(column_x + k, w, S(0)) -
           (own - read<V>(centre_own + k, w, S(0))) * read<V>(column_y + k, w, S(0));
  }
};

template <class S>
void emit_row(const DistParams& p, int64_t i) {
  using V = typename VectorOf<S>::V;
  DistRow& row = p.row[i];
  const S* columns = (const S*)p.columns;
  const auto column = [&](int m) { return columns + m * dist_stride(p); };
  const S inverse[2] = {(S)row.inverse_s, (S)row.inverse_t};
  const S mean[2] = {(S)row.mean_s * inverse[0], (S)row.mean_t * inverse[1]};
  DistSide<S> sides[2] = {
      {{p.grad_student, i, false}, (S)row.x, (S)row.y_s, mean[0], mean[1], column(centre_s),
       column(centre_t), column(column_x), column(column_y_s)},
      {{p.grad_teacher, i, false}, (S)row.x, (S)row.y_t, mean[1], mean[0], column(centre_t),
       column(centre_s), column(column_x), column(column_y_t)}};
  if (p.mask && !p.mask[i]) {
    for (int side = 0; side < 2; side++) {
      sides[side].to.zero(p.classes);
      if (p.row_factor) p.row_factor[side * p.rows + i] = 0;
    }
    return;
  }
  const bool wanted[2] = {sides[0].to.wanted() || p.temperature_grad,
                          sides[1].to.wanted() || p.temperature_grad};
  const RowReader<S> readers[2] = {{p.student, row_offset(p.student, i)},
                                   {p.teacher, row_offset(p.teacher, i)}};
  const S maxima[2] = {(S)row.max_s, (S)row.max_t}, rate = exp_rate<S>(1 / p.temperature);
  alignas(64) S soft[2][block], g[2][block], scratch[block], out[block];
  const S* probabilities[2];
  const auto prepare = [&](int64_t first, int n) {
    for (int side = 0; side < 2; side++) {
      if (p.soft) {
        probabilities[side] = (const S*)p.soft + (side * p.rows + i) * dist_stride(p) + first;
        continue;
      }
      exponentials(readers[side], first, n, maxima[side], rate, inverse[side], scratch, soft[side]);
      probabilities[side] = soft[side];
    }
    for (int side = 0; side < 2; side++) {
      if (!wanted[side]) continue;
      const DistSide<S> own = sides[side];
      const S *p_own = probabilities[side], *p_other = probabilities[1 - side];
      S* to = g[side];
      const bool half = p.row_factor;
      V dot{}, high{};
      sweep<V>(n, [&](int k, auto w) {
        const V a = read<V>(p_own + k, w, S(0));
        const V d = own.gradient(first + k, w, a, read<V>(p_other + k, w, S(0)));
        write<V>(to + k, w, d);
        dot += a * d;
        if (half) high = at_least(magnitude(d), high);
      });
      sides[side].dot += sum(dot);
      if (largest(high) > sides[side].largest_g) sides[side].largest_g = largest(high);
    }
  };
  for_blocks(p.classes, [&](int64_t first, int n) { prepare(first, n); });
  const double dots[2] = {sides[0].dot, sides[1].dot};
  double scale[2] = {1, 1};
  for (int side = 0; side < 2 && p.row_factor; side++) {
    if (sides[side].to.rows.dtype == DType::float16)
      scale[side] = half_scale(2 * sides[side].largest_g / p.temperature);
    p.row_factor[side * p.rows + i] = 1 / scale[side];
  }
  double slope = 0;
  for_blocks(p.classes, [&](int64_t first, int n) {
    if (p.classes > block) prepare(first, n);
    for (int side = 0; side < 2; side++) {
      if (!wanted[side]) continue;
      const RowWriter<S>& to = sides[side].to;
      const S dot = (S)dots[side], factor = S(scale[side] / p.temperature);
      const S *from = g[side], *own = probabilities[side];
      S* grad = to.wanted() ? to.at(first, out) : out;
      sweep<V>(n, [&](int k, auto w) {
        write<V>(grad + k, w,
                 read<V>(own + k, w, S(0)) * factor * (read<V>(from + k, w, S(0)) - dot));
      });
      if (p.temperature_grad) {
        const S* z = readers[side].get(first, n, scratch);
        V sums{};
        sweep<V>(n, [&](int k, auto w) {
          sums += read<V>(grad + k, w, S(0)) * (read_logits<V>(z + k, w) - maxima[side]);
        });
        slope += sum(sums) / scale[side];
      }
      if (to.wanted()) to.flush(first, n, grad);
    }
  });
  row.slope = slope;
}
