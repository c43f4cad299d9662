// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

kd::Rows as_one_row(const py::object& o, const char* name) {
  kd::Rows row;
  if (o.is_none()) return row;
  const auto array = o.cast<py::array>();
  row.data = const_cast<void*>(array.data()), row.dtype = dtype_of(array, name);
  return row;
}

// The loss; gradients are filled. Arrays are (B, C, P), contiguous; the parameter, None or of the
// type accumulated in, has sizes of theirs or 1, and `slope`, its gradient, is None or (C,).
double elementwise(const py::array& student, const py::array& teacher, const py::object& parameter,
                   double factor, std::vector<double> numbers, std::vector<int64_t> choices,
                   const py::object& grad_student, const py::object& grad_teacher,
                   const py::object& slope, int threads) {
  kd::ElementParams p;
  static_cast<kd::ElementNumbers&>(p) = unpack<kd::ElementNumbers>(numbers);
  static_cast<kd::ElementChoices&>(p) = unpack<kd::ElementChoices>(choices);
  p.student = as_one_row(student, "student"), p.teacher = as_one_row(teacher, "teacher");
  p.parameter = as_one_row(parameter, "parameter");
  p.grad_student = as_one_row(grad_student, "grad_student");
  p.grad_teacher = as_one_row(grad_teacher, "grad_teacher");
  p.factor = factor;
  int64_t strides[3] = {0, 0, 0};
  if (!parameter.is_none()) {
    const auto array = parameter.cast<py::array>();
    for (int d = 0; d < 3; d++)
      if (array.shape(d) > 1) strides[d] = array.strides(d) / array.itemsize();
  }
  if (!kd::lay_out(p, student.shape(0), student.shape(1), student.shape(2), false, strides))
    throw py::value_error("the parameter does not lie as the maps do");
  const int64_t tasks = kd::element_tasks(p);
  std::vector<double> losses(tasks), slopes;
  p.loss = losses.data();
  if (!slope.is_none()) {
    slopes.resize(kd::element_slopes(p));
    (p.parameter.class_stride == 1 ? p.column_slope : p.row_slope) = slopes.data();
  }
  double loss = 0;
  {
    py::gil_scoped_release release;
    split_tasks(tasks, threads,
                [&](int64_t a, int64_t b) { kd::kernels().elementwise(p, a, b); });
    for (const double one : losses) loss += one;
  }
  if (!slope.is_none()) {
    auto by_channel = slope.cast<py::array_t<double>>();
    double* sums = by_channel.mutable_data();
    for (py::ssize_t k = 0; k < by_channel.size(); k++) sums[k] = 0;
    for (size_t i = 0; i < slopes.size(); i++) sums[i % by_channel.size()] += slopes[i];
    for (py::ssize_t k = 0; k < by_channel.size(); k++) sums[k] *= factor;
  }
  return loss * factor;
}

}  // namespace

void bind_maps(py::module_& m) { m.def("elementwise", &elementwise); }

}  // namespace kd::python
