// SPDX-License-Identifier: Apache-2.0
// RKD from two Gram matrices of centred embeddings: with G, |e_i - e_j|^2 = G_ii + G_jj - 2 G_ij and
// u_ij . u_ik = (G_jk - G_ij - G_ik + G_ii) / (d_ij d_ik). The B^3 angles live in registers; what is
// stored are B x B matrices, 6 of them, which a task streams from L2 once for two rows j.
//
// With g the slope of the loss in an angle, A_i(j, k) = 2 g / (d_ij d_ik) and
// c_ij = sum_k g u_ij . u_ik, the gradient to e_j is sum_k w_jk e_k with a symmetric w of zero rows:
//   w_jk = sum_i A_i(j, k) + t_jk + t_kj,  t_ij = 2 c_ij / d_ij^2 - sum_k A_i(j, k),  j != k.
// Included inside an ISA level's namespace.

KD_FN vd clamped(vd x) { return at_most(at_least(x, all<vd>(-1)), all<vd>(1)); }
// Of smooth L1 whose slope, x clamped, is c.
KD_FN vd smooth(vd x, vd c) { return c * (x - 0.5 * c); }

// |e_i - e_k|^2 of a vector of k, and whether that is a pair of distinct rows.
struct Squares {
  vd value;
  vl pair;
};
KD_FN Squares squares(const Relation& p, const Embeddings& x, int64_t i, int64_t k) {
  const vd lengths = load<vd>(x.row[0] + k) + x.row[0][i];
  const vl index = counting() + k;
  return {lengths - 2 * load<vd>(x.gram + i * p.padded + k), (index != i) & (index < p.rows)};
}
// The distance that is compared: 0 on the diagonal and beyond the rows.
KD_FN vd distance(const Relation& p, const Squares& s) {
  const vd raised = at_least(s.value, all<vd>(least_square));
  return select(s.pair, p.rkd_choices.squared ? raised : square_root(raised), vd{});
}

// Squared lengths, which the other steps read, and the inverse distances of row i and their sum.
inline void rkd_lengths(const Relation& p, int64_t i) {
  for (const Embeddings& x : p.side) {
    vd sums{};
    const double own = x.row[0][i];
    for (int64_t k = 0; k < p.padded; k += lanes) {
      const Squares s = squares(p, x, i, k);
      const vd inverse = 1 / square_root(s.value);
      const vl far = s.value > near_square * (load<vd>(x.row[0] + k) + own);
      store(x.inverse + i * p.padded + k, select(s.pair & far, inverse, vd{}));
      sums += distance(p, s);
    }
    x.row[1][i] = sum(sums);
  }
}

// The loss of row i's distances, over the means in p.total, and sums for their derivatives.
inline void rkd_pairs(const Relation& p, int64_t i) {
  vd loss{}, slope_s{}, slope_t{};
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd s = distance(p, squares(p, p.side[0], i, k));
    const vd t = distance(p, squares(p, p.side[1], i, k));
    const vd x = s * (1 / p.total[0]) - t * (1 / p.total[1]), c = clamped(x);
    loss += smooth(x, c);
    slope_s += c * s, slope_t -= c * t;
  }
  p.loss[i] += p.rkd.distance * sum(loss);
  p.slope[0][i] = sum(slope_s), p.slope[1][i] = sum(slope_t);
}

// The angles at every i between rows j, j + 1 and all others, of `own` against `other`.
inline void rkd_triples(const Relation& p, const Embeddings& own, const Embeddings& other,
                        int64_t j) {
  const int64_t size = p.padded;
  double* edges[2] = {own.edges + j * size, own.edges + (j + 1) * size};
  const double* of_own[2] = {own.gram + j * size, own.gram + (j + 1) * size};
  const double* of_other[2] = {other.gram + j * size, other.gram + (j + 1) * size};
  __builtin_memset(edges[0], 0, 2 * size * sizeof(double));
  vd loss{};
  for (int64_t i = 0; i < p.rows; i++) {
    const double *g_own = own.gram + i * size, *r_own = own.inverse + i * size;
    const double *g_other = other.gram + i * size, *r_other = other.inverse + i * size;
    vd near[2] = {}, turn[2] = {};
    for (int64_t k = 0; k < size; k += lanes) {
      const vd go = load<vd>(g_own + k), ro = load<vd>(r_own + k);
      const vd gx = load<vd>(g_other + k), rx = load<vd>(r_other + k);
      for (int n = 0; n < 2; n++) {
        const vd a = (load<vd>(of_own[n] + k) - go + (g_own[i] - g_own[j + n])) * ro;
        const vd b = (load<vd>(of_other[n] + k) - gx + (g_other[i] - g_other[j + n])) * rx;
        const vd angle = a * r_own[j + n], x = angle - b * r_other[j + n], c = clamped(x);
        loss += smooth(x, c);
        turn[n] += c * angle;
        const vd slope = c * ro;
        near[n] += slope;
        store(edges[n] + k, load<vd>(edges[n] + k) + slope * r_own[j + n]);
      }
    }
    for (int n = 0; n < 2; n++) {
      const double r = r_own[j + n];
      p.turns[i * size + j + n] = 2 * r * (sum(turn[n]) * r - sum(near[n]));
    }
  }
  p.loss[j] += p.rkd.angle * sum(loss);
}

// Row j of the edges, of what the steps before have found.
inline void rkd_edges(const Relation& p, int side, int64_t j) {
  const Embeddings& x = p.side[side];
  const int64_t size = p.padded;
  double* row = x.edges + j * size;
  const double inverse = 1 / p.total[side], other = 1 / p.total[1 - side];
  // Through the mean.
  double common = 0;
  for (int64_t i = 0; i < p.rows; i++) common += p.slope[side][i];
  if (p.rows > 1) common *= inverse * inverse / (double)(p.rows * (p.rows - 1));
  vd sums{};
  for (int64_t k = 0; k < size; k += lanes) {
    vd w{};
    if (p.rkd.angle != 0) {
      vd back;
      for (int l = 0; l < lanes; l++) back[l] = p.turns[(k + l) * size + j];
      w = p.rkd.angle * (2 * load<vd>(row + k) + load<vd>(p.turns + j * size + k) + back);
    }
    const Squares s = squares(p, x, j, k);
    if (p.rkd.distance != 0) {
      const vd d = distance(p, s);
      const vd far = distance(p, squares(p, p.side[1 - side], j, k));
      const vd c = clamped(d * inverse - far * other);
      const vd q = 2 * p.rkd.distance * (c * inverse - common);
      const vd slope = p.rkd_choices.squared ? 2 * q : q / d;
      w -= select(s.value > all<vd>(least_square), slope, vd{});
    }
    w = select(s.pair, w, vd{});
    sums += w;
    store(row + k, w);
  }
  row[j] = -sum(sums);  // rows of w are 0 in sum
}
