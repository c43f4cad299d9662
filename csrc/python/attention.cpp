// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

// The forward, and with `upstream` the backward; teacher and its gradient (N, K), the others as in
// kd/attention.h, contiguous and of one dtype.
void attention(const py::array& teacher, const py::array& scores, const py::array& values,
               const py::object& temperature, bool residual, py::array out, py::array stats,
               const py::object& upstream, const py::object& grad_teacher,
               const py::object& grad_temperature, const py::object& grad_scores,
               const py::object& grad_values, int threads) {
  kd::ClassAttention p;
  p.rows = teacher.shape(0), p.classes = teacher.shape(1), p.heads = scores.shape(0);
  p.in_double = dtype_of(scores, "scores") == kd::DType::float64;
  p.teacher = rows_of(teacher, "teacher");
  p.temperature = scalar_of(temperature);
  p.residual = residual;
  p.scores = scores.data(), p.values = values.data();
  p.out = out.mutable_data(), p.stats = stats.mutable_data();
  const int64_t size = p.in_double ? 8 : 4;
  std::vector<double> soft(p.rows * kd::padded(p.classes));
  std::vector<uint8_t> some_off(p.rows);
  std::vector<char> partial(kd::row_blocks(p.classes) * 2 * p.heads * (p.classes + 1) * size);
  p.soft = soft.data(), p.some_off = some_off.data(), p.partial = partial.data();
  const auto data = [](const py::object& o) { return o.cast<py::array>().mutable_data(); };
  if (!upstream.is_none()) {
    p.upstream = data(upstream);
    p.grad_scores = data(grad_scores), p.grad_values = data(grad_values);
    p.grad_teacher = rows_or_none(grad_teacher, "grad_teacher");
    p.grad_temperature = static_cast<double*>(data(grad_temperature));
  }
  py::gil_scoped_release release;
  const auto run = [&](kd::AttentionStep step) {
    // As many tasks as there are rows of `grain` elements.
    split_rows(kd::tasks(p, step), kd::grain, threads, [&](int64_t begin, int64_t end) {
      kd::kernels().attention(p, step, begin, end);
    });
  };
  run(kd::AttentionStep::soften);
  run(kd::AttentionStep::forward);
  if (!p.upstream) return;
  run(kd::AttentionStep::backward);
  run(kd::AttentionStep::collect);
  run(kd::AttentionStep::teacher);
}

}  // namespace

void bind_attention(py::module_& m) { m.def("attention", &attention); }

}  // namespace kd::python
