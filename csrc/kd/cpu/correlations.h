// SPDX-License-Identifier: Apache-2.0
// DIST's steps, for whoever has threads: `parallel(tasks, f)` calls f(begin, end) for parts of
// [0, tasks) and returns when all are done.
#pragma once
#include <memory>

#include "kernels.h"
#include "steps.h"

namespace kd {

struct Correlations {
  double loss = 0, temperature_slope = 0;

  template <class Parallel>
  Correlations(DistParams& p, const Parallel& parallel) {
    const int64_t blocks = dist_blocks(p.rows, p.classes);
    const int64_t size = dist_block_rows(p.rows, p.classes);
    const int64_t columns = dist_column_tasks(p.classes);
    static_assert(dist_tasks <= Steps::most_tasks);
    const std::unique_ptr<DistRow[]> rows(new DistRow[p.rows]);
    const std::unique_ptr<double[]> memory(new double[dist_scratch(p)]);
    p.row = rows.get();
    dist_place(p, memory.get());
    const bool emits = p.grad_student.data || p.grad_teacher.data || p.temperature_grad;

    Steps steps;
    const Kernels& kernel = kernels();
    parallel(blocks, [&](int64_t a, int64_t b) {
      if (p.counted > 0) {
        steps.run(0, blocks, a, b, false, [&](int64_t i) { kernel.dist_measure(p, i, i + 1); });
        steps.run(1, columns, a * columns / blocks, b * columns / blocks, false,
                  [&](int64_t i) { kernel.dist_columns(p, i, i + 1); });
      }
      if (emits)  // the rows measured last first: they are still in the cache
        steps.run(2, blocks, a, b, true, [&](int64_t i) {
          kernel.dist_emit(p, i * size, i * size + size < p.rows ? i * size + size : p.rows);
        });
    });
    if (p.counted > 0) {
      for (int64_t i = 0; i < p.rows; i++) loss += p.row[i].loss;
      for (int64_t i = 0; i < columns; i++) loss += p.column_loss[i];
    }
    if (!p.temperature_grad) return;
    for (int64_t i = 0; i < p.rows; i++) temperature_slope -= p.row[i].slope;
    temperature_slope = (temperature_slope + (p.t2 ? 2 * loss : 0)) / p.temperature;
  }
};

}  // namespace kd
