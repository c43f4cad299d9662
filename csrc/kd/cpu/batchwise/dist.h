// SPDX-License-Identifier: Apache-2.0
// DIST: Pearson correlations of the two softmaxes along rows and along columns, and the gradients.
// The logits are read from memory twice and every gradient written once (fp32, loss and student
// gradient: 20 bytes an element); nothing of their size is kept in between.
//
//   measure  per block of rows: each row's softmax and correlation, and the block's column moments
//   merge    the blocks' moments in their order: column correlations and gradient coefficients
//   emit     softmax again, and the gradients
//
// Correlations are taken in double, of differences that are exactly 0 for constant rows and
// columns: rows are centred as exponentials, whose largest is 1, and columns are measured from the
// block's first row. Included inside an ISA level's namespace.

constexpr int group = 8;  // rows whose softmaxes wait, in L2 at most, for their column moments

// Half a vector of fp32, or a whole one of fp64, as fp64.
typedef float vhalf __attribute__((vector_size(KD_BYTES / 2)));
KD_FN vd widened(const float* p) {
  vhalf v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}
KD_FN vd widened(const double* p) { return load<vd>(p); }

struct Pearson {
  double correlation = 0, x = 0, y_s = 0, y_t = 0;
};
// From the centred sums of squares and products: d correlation / d s = x t - y_s s.
inline Pearson pearson(double ss, double tt, double st, bool clamp) {
  const double s = __builtin_sqrt(ss), t = __builtin_sqrt(tt);
  const double low_s = clamp && s < dist_eps ? dist_eps : s;
  const double low_t = clamp && t < dist_eps ? dist_eps : t;
  const double product = clamp ? low_s * low_t : s * t + dist_eps;
  Pearson r;
  r.correlation = st / product;
  r.x = 1 / product;
  // d product / d s = s-hat t, less where a norm is clamped; at a norm of 0 the subgradient 0.
  if (s > 0 && low_s == s) r.y_s = r.correlation / product * low_t / s;
  if (t > 0 && low_t == t) r.y_t = r.correlation / product * low_s / t;
  return r;
}

// exp((z - max) / temperature) * factor of part of a row; `out` has room for a whole vector more.
template <class S>
KD_FN void exponentials(const RowReader<S>& row, int64_t first, int n, S max, S rate, S factor,
                        S* scratch, S* out) {
  using V = typename VectorOf<S>::V;
  const S* z = row.get(first, n, scratch);
  sweep<V>(n, [&](int i, auto w) {
    store<V>(out + i, exp_at_rate(read_logits<V>(z + i, w) - max, rate) * factor);
  });
}

template <class S>
KD_FN double total(const S* e, int n) {
  using V = typename VectorOf<S>::V;
  V sums{};
  sweep<V>(n, [&](int i, auto w) { sums += read<V>(e + i, w, S(0)); });
  return sum(sums);
}

template <class S>
struct Centred {
  double ss = 0, tt = 0, st = 0;
  // Adds n exponentials, and turns them into probabilities.
  KD_FN void add(S* s, S* t, int n, S mean_s, S mean_t, S inverse_s, S inverse_t) {
    constexpr int width = Lanes<vd>::count;
    for (int i = n; i % width; i++) s[i] = mean_s, t[i] = mean_t;
    vd sum_ss{}, sum_tt{}, sum_st{};
    for (int i = 0; i < n; i += width) {
      const vd ds = widened(s + i) - (double)mean_s, dt = widened(t + i) - (double)mean_t;
      sum_ss += ds * ds, sum_tt += dt * dt, sum_st += ds * dt;
    }
    ss += sum(sum_ss), tt += sum(sum_tt), st += sum(sum_st);
    using V = typename VectorOf<S>::V;
    sweep<V>(n, [&](int i, auto w) {
      write<V>(s + i, w, read<V>(s + i, w, S(0)) * inverse_s);
      write<V>(t + i, w, read<V>(t + i, w, S(0)) * inverse_t);
    });
  }
};

template <class S>
void measure_block(const DistParams& p, int64_t b) {
  using V = typename VectorOf<S>::V;
  const int64_t c = p.classes, size = dist_block_rows(p.rows, c);
  const int64_t begin = b * size, end = begin + size < p.rows ? begin + size : p.rows;
  double* moments = p.moments + b * dist_moments * c;
  __builtin_memset(moments, 0, dist_moments * c * sizeof(double));
  const S rate = exp_rate<S>(1 / p.temperature);
  alignas(64) S soft[2 * group][block + Lanes<V>::count], scratch[block];
  bool pivoted = false;
  int64_t members[group], counted = 0;
  for (int64_t next = begin; next < end;) {
    int n_rows = 0;
    for (; next < end && n_rows < group; next++)
      if (!p.mask || p.mask[next]) members[n_rows++] = next;
    if (!n_rows) break;
    counted += n_rows;
    const auto soften = [&](int g, int64_t first, int n) {
      const DistRow& row = p.row[members[g]];
      exponentials<S>({p.student, row_offset(p.student, members[g])}, first, n, (S)row.max_s, rate,
                      S(1), scratch, soft[2 * g]);
      exponentials<S>({p.teacher, row_offset(p.teacher, members[g])}, first, n, (S)row.max_t, rate,
                      S(1), scratch, soft[2 * g + 1]);
    };
    for (int g = 0; g < n_rows; g++) {
      DistRow& row = p.row[members[g]];
      row.max_s = largest_of<S>({p.student, row_offset(p.student, members[g])}, c);
      row.max_t = largest_of<S>({p.teacher, row_offset(p.teacher, members[g])}, c);
      double total_s = 0, total_t = 0;
      for_blocks(c, [&](int64_t first, int n) {
        soften(g, first, n);
        total_s += total(soft[2 * g], n), total_t += total(soft[2 * g + 1], n);
      });
      if (!(row.max_s > floor_of<S>)) total_s = __builtin_nan("");  // no finite class
      if (!(row.max_t > floor_of<S>)) total_t = __builtin_nan("");
      row.inverse_s = S(1 / total_s), row.inverse_t = S(1 / total_t);
      row.mean_s = S(total_s / c), row.mean_t = S(total_t / c);
    }
    Centred<S> centred[group];
    for_blocks(c, [&](int64_t first, int n) {
      for (int g = 0; g < n_rows; g++) {
        const DistRow& row = p.row[members[g]];
        if (c > block) soften(g, first, n);
        centred[g].add(soft[2 * g], soft[2 * g + 1], n, (S)row.mean_s, (S)row.mean_t,
                       (S)row.inverse_s, (S)row.inverse_t);
      }
      double* at[dist_moments];
      for (int m = 0; m < dist_moments; m++) at[m] = moments + m * c + first;
      if (!pivoted)
        for (int i = 0; i < n; i++) at[mean_s][i] = soft[0][i], at[mean_t][i] = soft[1][i];
      sweep<vd>(n, [&](int i, auto w) {
        const vd pivot_s = read<vd>(at[mean_s] + i, w, 0.), pivot_t = read<vd>(at[mean_t] + i, w, 0.);
        vd s{}, t{}, ss{}, tt{}, st{};
        for (int g = 0; g < n_rows; g++) {
          const vd ds = widened(soft[2 * g] + i) - pivot_s;
          const vd dt = widened(soft[2 * g + 1] + i) - pivot_t;
          s += ds, t += dt, ss += ds * ds, tt += dt * dt, st += ds * dt;
        }
        const auto add = [&](double* to, vd v) { write<vd>(to + i, w, read<vd>(to + i, w, 0.) + v); };
        add(at[sum_s], s), add(at[sum_t], t);
        add(at[sum_ss], ss), add(at[sum_tt], tt), add(at[sum_st], st);
      });
    });
    pivoted = true;
    for (int g = 0; g < n_rows; g++) {
      DistRow& row = p.row[members[g]];
      const double i_s = row.inverse_s, i_t = row.inverse_t;
      const Pearson r = pearson(centred[g].ss * i_s * i_s, centred[g].tt * i_t * i_t,
                                centred[g].st * i_s * i_t, p.clamp);
      const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.beta / p.counted;
      row.loss = weight * (1 - r.correlation);
      row.x = -weight * r.x, row.y_s = -weight * r.y_s, row.y_t = -weight * r.y_t;
    }
  }
  // From the pivot to the mean.
  for (int64_t k = 0; counted && k < c; k++) {
    double* m = moments + k;
    const double s = m[sum_s * c] / counted, t = m[sum_t * c] / counted;
    m[mean_s * c] += s, m[mean_t * c] += t;
    m[sum_ss * c] -= m[sum_s * c] * s, m[sum_tt * c] -= m[sum_t * c] * t;
    m[sum_st * c] -= m[sum_s * c] * t;
  }
}

inline double at_least_zero(double x) { return x < 0 ? 0 : x; }  // NaN stays

// Rows of a block that take part.
inline int64_t counted_in(const DistParams& p, int64_t b) {
  const int64_t size = dist_block_rows(p.rows, p.classes), begin = b * size;
  const int64_t end = begin + size < p.rows ? begin + size : p.rows;
  if (!p.mask) return end - begin;
  int64_t n = 0;
  for (int64_t i = begin; i < end; i++) n += p.mask[i] != 0;
  return n;
}

template <class S>
void merge_columns(const DistParams& p, int64_t begin, int64_t end) {
  const int64_t c = p.classes, blocks = dist_blocks(p.rows, c);
  const double weight = (p.t2 ? p.temperature * p.temperature : 1) * p.gamma / c;
  S* out = (S*)p.columns;
  for (int64_t first = begin; first < end; first += block) {
    const int n = end - first < block ? (int)(end - first) : block;
    double s[block] = {}, t[block] = {}, ss[block] = {}, tt[block] = {}, st[block] = {};
    int64_t counted = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t own = counted_in(p, b);
      if (!own) continue;
      const double* m = p.moments + b * dist_moments * c + first;
      const double share = (double)own / (counted + own), cross = counted * share;
      counted += own;
      for (int k = 0; k < n; k++) {
        const double ds = m[mean_s * c + k] - s[k], dt = m[mean_t * c + k] - t[k];
        s[k] += ds * share, t[k] += dt * share;
        ss[k] += m[sum_ss * c + k] + ds * ds * cross;
        tt[k] += m[sum_tt * c + k] + dt * dt * cross;
        st[k] += m[sum_st * c + k] + ds * dt * cross;
      }
    }
    for (int k = 0; k < n; k++) {
      const Pearson r = pearson(at_least_zero(ss[k]), at_least_zero(tt[k]), st[k], p.clamp);
      p.column_loss[first + k] = weight * (1 - r.correlation);
      S* to = out + first + k;
      to[centre_s * c] = S(s[k]), to[centre_t * c] = S(t[k]);
      to[column_x * c] = S(-weight * r.x);
      to[column_y_s * c] = S(-weight * r.y_s), to[column_y_t * c] = S(-weight * r.y_t);
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
  const auto column = [&](int m) { return columns + m * p.classes; };
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
  alignas(64) S soft[2][block + Lanes<V>::count], g[2][block], scratch[block], out[block];
  const auto prepare = [&](int64_t first, int n) {
    for (int side = 0; side < 2; side++)
      exponentials(readers[side], first, n, maxima[side], rate, inverse[side], scratch, soft[side]);
    for (int side = 0; side < 2; side++) {
      if (!wanted[side]) continue;
      const DistSide<S> own = sides[side];
      const S *p_own = soft[side], *p_other = soft[1 - side];
      S* to = g[side];
      V dot{}, high{};
      sweep<V>(n, [&](int k, auto w) {
        const V a = read<V>(p_own + k, w, S(0));
        const V d = own.gradient(first + k, w, a, read<V>(p_other + k, w, S(0)));
        write<V>(to + k, w, d);
        dot += a * d, high = at_least(magnitude(d), high);
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
      const S *from = g[side], *own = soft[side];
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
