// SPDX-License-Identifier: Apache-2.0
// MLKD around its matrix products, all temperatures from one read of the logits.
//
//   softmax_row   p_s, p_s - p_t and KL(p_t || p_s) at every temperature; each row's maxima once
//   relation_row  from the gradient of the relations to p, and the KL's own, to that of the logits
//
// fp32: reads 8 bytes an element and writes 8 per temperature, then reads 12 per temperature and
// writes 4. The difference is taken as in the rowwise family, without cancellation: with
// A = sum exp(u_s) expm1(u_t - u_s), log1p(A / S) is the difference of the log-normalisers.
// Included inside an ISA level's namespace.

template <class S>
struct SoftPair {
  S max_s, max_t, inv_t, rate, delta = 0, inv_sum_s = 0, inv_sum_t = 0;
  bool subtract_first;

  SoftPair(S max_s, S max_t, double temperature)
      : max_s(max_s), max_t(max_t), inv_t(S(1 / temperature)), rate(exp_rate<S>(1 / temperature)),
        subtract_first(__builtin_fabs((double)max_t - max_s) <= 1) {}

  // u_t - u_s, 0 where the class is off on both sides; see log_ratio of the rowwise family.
  template <class V>
  KD_FN V log_ratio(V s, V t) const {
    if (subtract_first) return ((t - s) - (max_t - max_s)) * inv_t;
    const V d = ((t - max_t) - (s - max_s)) * inv_t;
    return select(s + t <= all<V>(2 * floor_of<S>), V{}, d);
  }
};

template <class S>
void softmax_row(const MlkdParams& p, int64_t i) {
  using V = typename VectorOf<S>::V;
  const int64_t size = p.rows * p.classes;
  S* const out = (S*)p.soft + i * p.classes;
  if (p.mask && !p.mask[i]) {
    for (int64_t k = 0; k < 2 * p.temperatures; k++)
      __builtin_memset(out + k * size, 0, p.classes * sizeof(S));
    ((S*)p.kl)[i] = 0;
    return;
  }
  const RowReader<S> student{p.student, row_offset(p.student, i)};
  const RowReader<S> teacher{p.teacher, row_offset(p.teacher, i)};
  const S max_s = largest_of(student, p.classes), max_t = largest_of(teacher, p.classes);
  const bool empty = !(max_s > floor_of<S>) || !(max_t > floor_of<S>);
  alignas(64) S buffer_s[block], buffer_t[block];
  double kl = 0;
  for (int64_t j = 0; j < p.temperatures; j++) {
    SoftPair<S> k(max_s, max_t, p.temperature[j]);
    S* const to_p = out + 2 * j * size;
    S* const to_d = to_p + size;
    double sum_s = 0, sum_t = 0, excess = 0;
    for_blocks(p.classes, [&](int64_t first, int n) {
      const S* s = student.get(first, n, buffer_s);
      const S* t = teacher.get(first, n, buffer_t);
      const SoftPair<S> c = k;
      V sums_s{}, sums_t{}, sums{};
      sweep<V>(n, [&](int m, auto w) {
        const V zs = read_logits<V>(s + m, w), zt = read_logits<V>(t + m, w);
        const V d = c.log_ratio(zs, zt);
        const V exp_s = exp_at_rate(zs - c.max_s, c.rate);
        const V exp_t = exp_at_rate(zt - c.max_t, c.rate);
        write<V>(to_p + first + m, w, exp_s), write<V>(to_d + first + m, w, exp_t);
        sums_s += exp_s, sums_t += exp_t;
        sums += select(is_near(d), exp_s * (d + d * d * expm1_tail(d)), exp_t - exp_s);
      });
      sum_s += sum(sums_s), sum_t += sum(sums_t), excess += sum(sums);
    });
    const double ratio = excess / sum_s;
    const bool close = __builtin_fabs(ratio) < 0.5;
    k.delta = S(close ? __builtin_log1p(ratio) : __builtin_log(sum_t / sum_s));
    k.inv_sum_s = S(empty ? __builtin_nan("") : 1 / sum_s);
    k.inv_sum_t = S(empty ? __builtin_nan("") : 1 / (close ? sum_s + excess : sum_t));
    double divergence = 0;
    for_blocks(p.classes, [&](int64_t first, int n) {
      const S* s = student.get(first, n, buffer_s);
      const S* t = teacher.get(first, n, buffer_t);
      const SoftPair<S> c = k;
      V sums{};
      sweep<V>(n, [&](int m, auto w) {
        const V zs = read_logits<V>(s + m, w), zt = read_logits<V>(t + m, w);
        const V d = c.log_ratio(zs, zt) - c.delta;
        const V prob = read<V>(to_p + first + m, w, S(0)) * c.inv_sum_s;
        const V direct = read<V>(to_d + first + m, w, S(0)) * c.inv_sum_t;
        const V square = d * d * expm1_tail(d), growth = d + square;
        const auto near = is_near(d);
        const V far = select(zs <= all<V>(floor_of<S>), all<V>(S(__builtin_inf())), direct * d);
        sums += select(near, prob * (growth * d - square),
                       select(direct == V{}, V{}, far) - (direct - prob));
        write<V>(to_p + first + m, w, prob);
        write<V>(to_d + first + m, w, select(near, -prob * growth, prob - direct));
      });
      divergence += sum(sums);
    });
    kl += p.temperature[j] * p.temperature[j] * (divergence < 0 ? 0 : divergence);
  }
  ((S*)p.kl)[i] = S(kl);
}

template <class S>
void relation_row(const MlkdParams& p, int64_t i) {
  using V = typename VectorOf<S>::V;
  const RowWriter<S> to(p.grad, i, false);
  if (p.row_factor) p.row_factor[i] = 0;
  if (p.mask && !p.mask[i]) return to.zero(p.classes);
  const int64_t size = p.rows * p.classes;
  const S* const soft = (const S*)p.soft + i * p.classes;
  const S* const relations = (const S*)p.relations + i * p.classes;
  // The teacher's gradient of the KL is the rowwise family's: mlkd_loss in kdkernels/functional.
  const double own = p.of_teacher ? 0 : (double)((const S*)p.row_weight)[i];
  S weight[most_temperatures], dot[most_temperatures];
  for (int64_t j = 0; j < p.temperatures; j++)
    weight[j] = S(own * p.temperature[j] * p.temperature[j]);
  // This side's p, d loss / d p up to what is the same for all classes, and p_s - p_t.
  struct Values {
    V p, g, d;
  };
  const auto values = [&](int64_t j, int64_t at, auto w) -> Values {
    const V ps = read<V>(soft + 2 * j * size + at, w, S(0));
    const V d = read<V>(soft + (2 * j + 1) * size + at, w, S(0));
    const V g = p.relations ? read<V>(relations + j * size + at, w, S(0)) : V{};
    if (!p.of_teacher) return {ps, g, d};
    return {ps - d, g, d};
  };
  double bound = 0;
  for (int64_t j = 0; j < p.temperatures; j++) {
    double total = 0;
    S most = 0;
    for_blocks(p.classes, [&](int64_t first, int n) {
      V sums{}, high = all<V>(most);
      sweep<V>(n, [&](int k, auto w) {
        const Values v = values(j, first + k, w);
        sums += v.p * v.g, high = at_least(magnitude(v.g), high);
      });
      total += sum(sums), most = largest(high);
    });
    dot[j] = (S)total;
    bound += (2 * (double)most + __builtin_fabs((double)weight[j])) / p.temperature[j];
  }
  double scale = 1;
  if (p.row_factor) {
    if (p.grad.dtype == DType::float16) scale = half_scale(bound);
    p.row_factor[i] = 1 / scale;
  }
  alignas(64) S out[block];
  for_blocks(p.classes, [&](int64_t first, int n) {
    S* grad = to.at(first, out);
    for (int64_t j = 0; j < p.temperatures; j++) {
      const S inverse = S(scale / p.temperature[j]), of_kl = p.of_teacher ? S(0) : weight[j];
      sweep<V>(n, [&](int k, auto w) {
        const Values v = values(j, first + k, w);
        const V dz = (v.p * (v.g - dot[j]) + v.d * of_kl) * inverse;
        write<V>(grad + k, w, j ? read<V>(grad + k, w, S(0)) + dz : dz);
      });
    }
    to.flush(first, n, grad);
  });
}
