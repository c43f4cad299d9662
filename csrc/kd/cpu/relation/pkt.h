// SPDX-License-Identifier: Apache-2.0
// PKT and polynomial kernels of two Gram matrices, each in three walks over their rows. A gradient to
// G is turned into edges E = H + H', symmetric as G is, so that rows alone are read.
// Included inside an ISA level's namespace.

// PKT. With m_i = 1 / (|x_i| + eps): S = (G_ij m_i m_j + 1) / 2, P = S over its rows' sums.
// row[0] is m, row[1] the sums; slope the rows' sums of dP P.
KD_FN vd similarity(const Relation& p, const Embeddings& x, int64_t i, int64_t k) {
  const vd g = load<vd>(x.gram + i * p.padded + k) * load<vd>(x.row[0] + k);
  return select(counting() + k < p.rows, 0.5 * (g * x.row[0][i] + 1), vd{});
}
inline void pkt_sums(const Relation& p, int64_t i) {
  for (const Embeddings& x : p.side) {
    vd sums{};
    for (int64_t k = 0; k < p.padded; k += lanes) sums += similarity(p, x, i, k);
    x.row[1][i] = sum(sums);
  }
}

// d loss / d P_s and / d P_t of a vector, and the terms of the loss.
struct PKTTerms {
  vd loss, of_student, of_teacher;
};
KD_FN PKTTerms pkt_terms(const Relation& p, vd s, vd t) {
  const vd ratio = (t - s) / (s + p.pkt.eps);
  const vd log = log1p_parts(ratio).value;
  return {t * log, -t / (s + p.pkt.eps), log + t / (t + p.pkt.eps)};
}
inline void pkt_rows(const Relation& p, int64_t i) {
  const double of_s = 1 / p.side[0].row[1][i], of_t = 1 / p.side[1].row[1][i];
  vd loss{}, slope_s{}, slope_t{};
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd s = similarity(p, p.side[0], i, k) * of_s, t = similarity(p, p.side[1], i, k) * of_t;
    const PKTTerms terms = pkt_terms(p, s, t);
    loss += terms.loss;
    slope_s += terms.of_student * s, slope_t += terms.of_teacher * t;
  }
  p.loss[i] = sum(loss), p.slope[0][i] = sum(slope_s), p.slope[1][i] = sum(slope_t);
}
inline void pkt_edges(const Relation& p, int side, int64_t i) {
  const Embeddings& x = p.side[side];
  double* row = x.edges + i * p.padded;
  const double m = x.row[0][i];
  vd sums{};
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd s = similarity(p, p.side[0], i, k), t = similarity(p, p.side[1], i, k);
    // Of entry (i, k), and of (k, i), whose similarities are the same and whose sums are row k's.
    const auto slope = [&](vd sum_s, vd sum_t, vd total) {
      const PKTTerms terms = pkt_terms(p, s / sum_s, t / sum_t);
      return ((side ? terms.of_teacher : terms.of_student) - total) / (side ? sum_t : sum_s);
    };
    const auto at = [&](const double* values) {
      return select(counting() + k < p.rows, load<vd>(values + k), all<vd>(1));
    };
    const vd both = slope(all<vd>(p.side[0].row[1][i]), all<vd>(p.side[1].row[1][i]),
                          all<vd>(p.slope[side][i])) +
                    slope(at(p.side[0].row[1]), at(p.side[1].row[1]), at(p.slope[side]));
    const vd e = select(counting() + k < p.rows, 0.5 * m * both * load<vd>(x.row[0] + k), vd{});
    sums += e * load<vd>(x.gram + i * p.padded + k);
    store(row + k, e);
  }
  const double length = __builtin_sqrt(x.gram[i * p.padded + i]);
  if (length > 0) row[i] -= m * sum(sums) / length;
}

// ||K(G_s) - K(G_t)||^2 of a polynomial K; p.total[0] is what its slopes are multiplied by.
KD_FN vd evaluated(const Relation& p, vd g, vd& slope) {
  vd value{};
  slope = vd{};
  for (int n = 15; n >= 0; n--) {
    slope = slope * g + value;
    value = value * g + p.polynomial.coefficient[n];
  }
  return value;
}
KD_FN vd difference(const Relation& p, int64_t i, int64_t k, int side, vd& slope) {
  vd unused;
  const vd s = evaluated(p, load<vd>(p.side[0].gram + i * p.padded + k), side ? unused : slope);
  const vd t = evaluated(p, load<vd>(p.side[1].gram + i * p.padded + k), side ? slope : unused);
  return select((counting() + k < p.rows), side ? t - s : s - t, vd{});
}
inline void polynomial_rows(const Relation& p, int64_t i) {
  vd loss{}, slope;
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd d = difference(p, i, k, 0, slope);
    loss += d * d;
  }
  p.loss[i] = sum(loss);
}
inline void polynomial_edges(const Relation& p, int side, int64_t i) {
  for (int64_t k = 0; k < p.padded; k += lanes) {
    vd slope;
    const vd d = difference(p, i, k, side, slope);
    store(p.side[side].edges + i * p.padded + k, p.total[0] * 2 * d * slope);
  }
}
