// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

void rowwise(const py::array& student, const py::array& teacher, std::vector<double> numbers,
             std::vector<int64_t> choices, const py::object& labels, const py::object& mask,
             const py::object& row_weight, const py::object& temperature,
             const py::object& teacher_temperature, const py::object& targets, double factor,
             py::array_t<double> row_loss,
             const py::object& grad_student, const py::object& grad_teacher,
             const py::object& row_grads, int threads) {
  kd::RowwiseParams p;
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  describe_rows(p, student, labels, mask, row_weight, factor, row_loss, row_grads);
  p.student = rows_of(student, "student"), p.teacher = rows_of(teacher, "teacher");
  p.teacher_classes = teacher.shape(1);
  p.teacher_first = p.teacher_classes == p.classes ? p.first : 0;
  p.targets = targets.is_none() ? p.labels
                                : static_cast<const int64_t*>(targets.cast<py::array>().data());
  p.tau_s = scalar_of(temperature), p.tau_t = scalar_of(teacher_temperature);
  p.grad_student = rows_or_none(grad_student, "grad_student");
  p.grad_teacher = rows_or_none(grad_teacher, "grad_teacher");
  p.parts = !row_grads.is_none() && row_grads.cast<py::array>().shape(0) == 6;
  py::gil_scoped_release release;
  const auto& kernel = kd::kernels().rowwise;
  split_rows(p.rows, p.classes, threads,
             [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// What backward does to a saved gradient (N, C), by a factor (1,) or (N,); for the tests.
void scale_rows(py::array grad, const py::object& factor, int threads) {
  const kd::Rows rows = rows_of(grad, "grad");
  const kd::RowScalar factors = scalar_of(factor);
  const auto* const f = static_cast<const double*>(factors.data);
  const int64_t classes = grad.shape(1);
  py::gil_scoped_release release;
  split_rows(grad.shape(0), classes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kd::kernels().scale_row(rows, i, classes, f[i * factors.stride]);
  });
}

}  // namespace

void bind_rowwise(py::module_& m) {
  m.def("rowwise", &rowwise);
  m.def("scale_rows", &scale_rows);
}

}  // namespace kd::python
