// SPDX-License-Identifier: Apache-2.0
// MLKD's relations step by step, for whoever has threads: `parallel(tasks, f)` calls f(begin, end)
// for parts of [0, tasks) and returns when all are done.
#pragma once
#include <math.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace kd {

// What MlkdRelations is given, as tasks at one temperature after another, or, of a small batch, one
// temperature each.
class Relations {
 public:
  explicit Relations(const MlkdRelations& given) : p(given) {
    const bool wide = p.rows <= p.classes;
    p.size = wide ? p.rows : p.classes, p.depth = wide ? p.classes : p.rows;
    p.near_weight = wide ? p.row_weight : p.column_weight;
    p.far_weight = wide ? p.column_weight : p.row_weight;
    p.selected = p.samples || p.columns;
    p.gathered = p.selected || !wide;
    if (p.selected) {
      if (p.near_weight != 0) near = chosen(wide ? p.samples : p.columns, p.size);
      if (p.far_weight != 0) far = chosen(wide ? p.columns : p.samples, p.depth);
    }
    p.near = near.data(), p.far = far.data();
    p.n_near = near.size(), p.n_far = p.selected ? far.size() : p.depth;
  }

  // The loss, with the gradients that there is memory for.
  template <class Parallel>
  double run(const Parallel& parallel) const {
    constexpr int64_t small = 1 << 21;
    std::vector<double> losses(p.temperatures);
    if (p.size * p.size * p.depth <= small) {
      const auto serial = [](int64_t tasks, const auto& f) { f(0, tasks); };
      parallel(p.temperatures, [&](int64_t a, int64_t b) {
        for (int64_t j = a; j < b; j++) losses[j] = at(j, serial);
      });
    } else {
      for (int64_t j = 0; j < p.temperatures; j++) losses[j] = at(j, parallel);
    }
    double loss = 0;
    for (double one : losses) loss += one;
    return loss < 0 ? 0 : loss;  // of rounding: it is a sum of squares
  }

 private:
  MlkdRelations p;
  std::vector<int64_t> near, far;

  std::vector<int64_t> chosen(const void* from, int64_t n) const {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < n; i++)
      if (!from || number(from, i) != 0) found.push_back(i);
    return found;
  }
  double number(const void* from, int64_t i) const {
    return p.in_double ? static_cast<const double*>(from)[i] : static_cast<const float*>(from)[i];
  }
  // What is left out must not hide a NaN, which is everybody's; a row has it everywhere.
  bool sound(int64_t temperature) const {
    for (int64_t i = 0; i < p.rows; i++) {
      const double d = number(p.soft, ((2 * temperature + 1) * p.rows + i) * p.classes);
      if (d != d) return false;
    }
    return true;
  }
  void fill(void* grad, int64_t temperature) const {
    const int64_t n = p.rows * p.classes;
    if (grad && p.in_double) std::fill_n(static_cast<double*>(grad) + temperature * n, n, NAN);
    else if (grad) std::fill_n(static_cast<float*>(grad) + temperature * n, n, NAN);
  }

  template <class Parallel>
  double at(int64_t temperature, const Parallel& parallel) const {
    if (!sound(temperature)) {
      fill(p.grad_student, temperature), fill(p.grad_teacher, temperature);
      return NAN;
    }
    MlkdRelations own = p;
    own.temperature = temperature;
    const int64_t far_rows = p.n_far ? p.size : 0, rows = p.n_near + far_rows;
    const std::unique_ptr<double[]> row_loss(new double[rows]);
    const int64_t bytes = relation_numbers(p) * (p.in_double ? 8 : 4);
    const std::unique_ptr<char[]> memory(new char[bytes + 64]);
    own.row_loss = row_loss.get();
    own.memory = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    const auto step = [&](RelateStep what, int64_t tasks) {
      if (!tasks) return;
      parallel(tasks, [&](int64_t a, int64_t b) { kernels().mlkd_relate(own, what, a, b); });
    };
    const auto panels = [](int64_t columns) { return (columns + panel - 1) / panel; };
    step(RelateStep::gather, p.gathered ? 2 * rows : 0);
    step(RelateStep::near_gram, panels(p.n_near));
    step(RelateStep::far_gram, panels(far_rows)), step(RelateStep::far_square, panels(far_rows));
    const auto gradients = [&](void* grad) {
      own.grad = grad;
      step(RelateStep::slopes, rows);
      if (!grad) return;
      if (p.selected) step(RelateStep::far_gradient, panels(p.n_far));
      step(RelateStep::gradient, panels(p.depth));
    };
    if (p.grad_student || !p.grad_teacher) gradients(p.grad_student);
    own.of_teacher = true;
    if (p.grad_teacher) gradients(p.grad_teacher);
    double loss = 0;
    for (int64_t i = 0; i < rows; i++) loss += own.row_loss[i];
    return loss;
  }
};

}  // namespace kd
