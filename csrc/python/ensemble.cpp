// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

// weights: float64 (M, 1) or (M, N); row_grads: (4 + M, N); grad_teachers: one a teacher.
void ensemble(const py::array& student, const std::vector<py::array>& teachers, bool mixture,
              std::vector<double> numbers, std::vector<int64_t> choices, const py::object& labels,
              const py::object& mask, const py::object& row_weight, const py::object& temperature,
              const py::object& teacher_temperature, const py::array_t<double>& weights,
              double factor, py::array_t<double> row_loss, const py::array& grad_student,
              const std::vector<py::array>& grad_teachers, const py::object& row_grads,
              int threads) {
  kd::EnsembleParams p;
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  describe_rows(p, student, labels, mask, row_weight, factor, row_loss, row_grads);
  p.student = rows_of(student, "student");
  p.tau_s = scalar_of(temperature), p.tau_t = scalar_of(teacher_temperature);
  p.grad_student = rows_of(grad_student, "grad_student");
  std::vector<kd::EnsembleTeacher> given(teachers.size());
  for (size_t m = 0; m < given.size(); m++) {
    given[m].logits = rows_of(teachers[m], "teachers");
    given[m].grad = rows_of(grad_teachers.at(m), "grad_teachers");
    given[m].weight.data = weights.data() + m * weights.shape(1);
    given[m].weight.is_double = true, given[m].weight.stride = weights.shape(1) > 1;
  }
  p.teachers = given.data(), p.count = given.size();
  p.mixture = mixture, p.weight_grads = true;
  py::gil_scoped_release release;
  const auto& kernel = kd::kernels().ensemble;
  split_rows(p.rows, p.classes * (1 + p.count), threads,
             [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void bind_ensemble(py::module_& m) { m.def("ensemble", &ensemble); }

}  // namespace kd::python
