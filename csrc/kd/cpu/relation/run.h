// SPDX-License-Identifier: Apache-2.0
// The steps of losses of embeddings in their order, for either binding. `parallel(tasks, work, f)`
// runs f on ranges of [0, tasks), `work` being that of one of them in multiplications.
#pragma once
#include <algorithm>
#include <cmath>

#include "../kernels.h"

namespace kd {

// Doubles that `share` hands out; `width` is that of both sides together.
inline int64_t relation_scratch(int64_t rows, int64_t width, bool rkd) {
  const int64_t n = relation_padded(rows);
  return n * width + (rkd ? 6 * n * n + width : 3 * n * n) + 7 * n + 8;
}

// Gives the steps their memory, 64-byte aligned; the sides share the edges, which are used in turn.
inline void share(Relation& r, double* memory, bool rkd) {
  const int64_t n = r.padded = relation_padded(r.rows);
  const auto take = [&](int64_t count) {
    double* const taken = memory;
    memory += count;
    return taken;
  };
  double* const edges = take(n * n);
  r.turns = rkd ? take(n * n) : nullptr;
  for (Embeddings& x : r.side) {
    x.panels = take(n * x.width);
    x.edges = edges;
    x.gram = take(n * n);
    x.inverse = rkd ? take(n * n) : nullptr;
    for (double*& row : x.row) row = take(n);
  }
  for (double*& slope : r.slope) slope = take(n);
  r.loss = take(n);
  for (Embeddings& x : r.side) x.mean = rkd ? take(x.width) : nullptr;
  std::fill(r.loss, r.loss + n, 0.0);
}

template <class Parallel>
struct RelationRun {
  Relation& r;
  const Parallel& parallel;

  void step(RelationStep what, int side, int64_t tasks, int64_t work) const {
    const auto kernel = kernels().relation;
    parallel(tasks, work, [&](int64_t a, int64_t b) { kernel(r, what, side, a, b); });
  }
  void rows(RelationStep what, int side, int64_t work) const { step(what, side, r.rows, work); }
  int64_t column_tasks(int side) const {
    return (r.side[side].width + relation_columns - 1) / relation_columns;
  }
  // f(side, task) of the tasks of both sides, which are as many.
  template <class F>
  void both(int64_t tasks, int64_t work, const F& f) const {
    parallel(2 * tasks, work, [&](int64_t a, int64_t b) {
      for (; a < b; a++) f(int(a / tasks), a % tasks);
    });
  }
  void grams() const {
    const auto kernel = kernels().relation;
    const int64_t groups = r.padded / relation_rows, half = (groups + 1) / 2;
    const int64_t width = std::max(r.side[0].width, r.side[1].width);
    for (int side = 0; side < 2; side++)
      if (r.side[side].mean)
        step(RelationStep::centre, side, column_tasks(side), r.rows * relation_columns);
    both(groups, relation_rows * width * 4, [&](int side, int64_t i) {
      kernel(r, RelationStep::pack, side, i, i + 1);
    });
    // A short group of rows with a long one each, so that tasks are even.
    both(half, relation_rows * (groups + 1) * relation_rows * width, [&](int side, int64_t i) {
      kernel(r, RelationStep::gram, side, i, i + 1);
      kernel(r, RelationStep::gram, side, std::max(groups - i - 1, half), groups - i);
    });
  }
  void gradient(int side) const {
    step(RelationStep::gradient, side, column_tasks(side), r.rows * r.padded * relation_columns);
  }
  double loss() const {
    double total = 0;
    for (int64_t i = 0; i < r.rows; i++) total += r.loss[i];
    return total;
  }

  double rkd() const {
    grams();
    const int64_t n = r.rows, size = r.padded;
    for (Embeddings& x : r.side)
      for (int64_t i = 0; i < size; i++) x.row[0][i] = x.gram[i * size + i];
    rows(RelationStep::rkd_lengths, 0, 32 * size);
    for (int side = 0; side < 2; side++) {
      double total = 0;
      for (int64_t i = 0; i < n; i++) total += r.side[side].row[1][i];
      r.total[side] = n > 1 ? total / (double)(n * (n - 1)) : 1;
    }
    if (r.rkd.distance != 0) rows(RelationStep::rkd_pairs, 0, 32 * size);
    double total = 0;
    for (int side = 0, first = 1; side < 2; side++) {
      const bool wanted = r.side[side].grad.data;
      if (!wanted && !(first && (side || !r.side[1].grad.data))) continue;
      if (r.rkd.angle != 0) step(RelationStep::rkd_triples, side, (n + 1) / 2, 32 * n * size);
      if (first) total = loss(), first = 0;
      if (!wanted) continue;
      rows(RelationStep::rkd_edges, side, 32 * size);
      gradient(side);
    }
    return total;
  }

  double pkt() const {
    grams();
    for (Embeddings& x : r.side)
      for (int64_t i = 0; i < r.padded; i++)
        x.row[0][i] = 1 / (std::sqrt(x.gram[i * r.padded + i]) + r.pkt.eps);
    rows(RelationStep::pkt_sums, 0, 4 * r.padded);
    rows(RelationStep::pkt_rows, 0, 32 * r.padded);
    for (int side = 0; side < 2; side++) {
      if (!r.side[side].grad.data) continue;
      rows(RelationStep::pkt_edges, side, 64 * r.padded);
      gradient(side);
    }
    return loss();
  }

  double polynomial(bool norm) const {
    grams();
    rows(RelationStep::polynomial_rows, 0, 64 * r.padded);
    const double square = loss(), distance = std::sqrt(square);
    r.total[0] = !norm ? 1 : square > 0 ? 0.5 / distance : 0;
    for (int side = 0; side < 2; side++) {
      if (!r.side[side].grad.data) continue;
      // Both entries of a pair: their gradients are the same.
      r.total[0] *= 2;
      rows(RelationStep::polynomial_edges, side, 64 * r.padded);
      r.total[0] /= 2;
      gradient(side);
    }
    return norm ? distance : square;
  }
};

template <class Parallel>
RelationRun<Parallel> relation_run(Relation& r, const Parallel& parallel) {
  return {r, parallel};
}

}  // namespace kd
