// SPDX-License-Identifier: Apache-2.0
// DIST's gradients, from what dist.h has measured. Included inside an ISA level's namespace.

// exp((z - max) / temperature) * factor of part of a row.
template <class S>
KD_FN void exponentials(const RowReader<S>& row, int64_t first, int n, S max, S rate, S factor,
                        S* scratch, S* out) {
  using V = typename VectorOf<S>::V;
  const S* z = row.get(first, n, scratch);
  sweep<V>(n, [&](int i, auto w) {
    write<V>(out + i, w, exp_at_rate(read_logits<V>(z + i, w) - max, rate) * factor);
  });
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
  const S mean[2] = {(S)row.mean_s, (S)row.mean_t};
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
