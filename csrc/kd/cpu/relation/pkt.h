// SPDX-License-Identifier: Apache-2.0
// PKT and polynomial kernels of two Gram matrices, each in three walks over their rows. A gradient to
// G is turned into edges E = H + H', symmetric as G is, so that rows alone are read.
// Included inside an ISA level's namespace.

// PKT. With m_i = 1 / (|x_i| + eps): S = (G_ij m_i m_j + 1) / 2, P = S over its rows' sums.
// row[0] is m, row[1] one over the sums; slope the rows' sums of dP P.
KD_FN vl inside(const Relation& p, int64_t k) { return counting() + k < p.rows; }
KD_FN vd similarity(const Relation& p, const Embeddings& x, int64_t i, int64_t k) {
  const vd g = load<vd>(x.gram + i * p.padded + k) * load<vd>(x.row[0] + k);
  return select(inside(p, k), 0.5 * (g * x.row[0][i] + 1), vd{});
}
inline void pkt_sums(const Relation& p, int64_t i) {
  for (const Embeddings& x : p.side) {
    vd sums{};
    for (int64_t k = 0; k < p.padded; k += lanes) sums += similarity(p, x, i, k);
    x.row[1][i] = 1 / sum(sums);
  }
}

// d sum t log((t + eps) / (s + eps)) of one side's probabilities.
template <int side>
KD_FN vd pkt_slope(const Relation& p, vd s, vd t) {
  const vd inverse = 1 / (s + p.pkt.eps);
  if (side == 0) return -t * inverse;
  return log1p_parts((t - s) * inverse).value + t / (t + p.pkt.eps);
}
inline void pkt_rows(const Relation& p, int64_t i) {
  const double of_s = p.side[0].row[1][i], of_t = p.side[1].row[1][i];
  vd loss{}, slope_s{}, slope_t{};
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd s = similarity(p, p.side[0], i, k) * of_s, t = similarity(p, p.side[1], i, k) * of_t;
    const vd inverse = 1 / (s + p.pkt.eps);
    const vd term = t * log1p_parts((t - s) * inverse).value;
    loss += term;
    slope_s -= t * inverse * s;
    if (p.side[1].grad.data) slope_t += term + t * t / (t + p.pkt.eps);
  }
  p.loss[i] = sum(loss), p.slope[0][i] = sum(slope_s), p.slope[1][i] = sum(slope_t);
}
template <int side>
inline void pkt_edges(const Relation& p, int64_t i) {
  const Embeddings& x = p.side[side];
  double* row = x.edges + i * p.padded;
  const double m = x.row[0][i];
  vd sums{};
  for (int64_t k = 0; k < p.padded; k += lanes) {
    const vd s = similarity(p, p.side[0], i, k), t = similarity(p, p.side[1], i, k);
    // Of entry (i, k), and of (k, i), whose similarities are the same and whose sums are row k's.
    const auto slope = [&](auto of_s, auto of_t, auto total) {
      return (pkt_slope<side>(p, s * of_s, t * of_t) - total) * (side ? of_t : of_s);
    };
    const auto at = [&](const double* values) {
      return select(inside(p, k), load<vd>(values + k), vd{});
    };
    const vd both = slope(p.side[0].row[1][i], p.side[1].row[1][i], p.slope[side][i]) +
                    slope(at(p.side[0].row[1]), at(p.side[1].row[1]), at(p.slope[side]));
    const vd e = select(inside(p, k), 0.5 * m * both * load<vd>(x.row[0] + k), vd{});
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
  return select(inside(p, k), side ? t - s : s - t, vd{});
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
