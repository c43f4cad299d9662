// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

#include "../kd/cpu/correlations.h"
#include "../kd/cpu/relations.h"

#include <tuple>

namespace kd::python {
namespace {

const uint8_t* mask_of(const py::object& mask) {
  return mask.is_none() ? nullptr : static_cast<const uint8_t*>(mask.cast<py::array>().data());
}

// The loss and its gradient to the temperature; row_factor: None or float64 (2, N).
std::pair<double, double> dist(const py::array& student, const py::array& teacher,
                               std::vector<double> numbers, std::vector<int64_t> choices,
                               const py::object& mask, const py::array& grad_student,
                               const py::array& grad_teacher, const py::object& row_factor,
                               int threads) {
  kd::DistParams p;
  static_cast<kd::DistNumbers&>(p) = unpack<kd::DistNumbers>(numbers);
  static_cast<kd::DistChoices&>(p) = unpack<kd::DistChoices>(choices);
  p.rows = p.counted = student.shape(0), p.classes = student.shape(1);
  p.student = rows_of(student, "student"), p.teacher = rows_of(teacher, "teacher");
  p.mask = mask_of(mask);
  if (p.mask) p.counted = std::count_if(p.mask, p.mask + p.rows, [](uint8_t m) { return m != 0; });
  p.grad_student = rows_of(grad_student, "grad_student");
  p.grad_teacher = rows_of(grad_teacher, "grad_teacher");
  if (!row_factor.is_none())
    p.row_factor = row_factor.cast<py::array_t<double>>().mutable_data();
  p.temperature_grad = true;
  py::gil_scoped_release release;
  const kd::Correlations found(p, [&](int64_t tasks, const auto& f) {
    split_tasks(tasks, threads, f);
  });
  return {found.loss, found.temperature_slope};
}

// The steps of MLKD, arguments and results as those of the torch operators (kdkernels/ops/
// batchwise.py), arrays contiguous. For the tests.
kd::MlkdParams mlkd(const py::array& logits, const std::vector<double>& temperatures,
                    const py::object& mask) {
  kd::MlkdParams p;
  p.rows = logits.shape(0), p.classes = logits.shape(1);
  p.temperatures = temperatures.size(), p.temperature = temperatures.data();
  if (p.temperatures > kd::most_temperatures) throw py::value_error("too many temperatures");
  p.mask = mask_of(mask);
  return p;
}

py::array like(bool in_double, std::vector<py::ssize_t> shape) {
  if (in_double) return py::array_t<double>(shape);
  return py::array_t<float>(shape);
}

std::pair<py::array, py::array> mlkd_softmax(const py::array& student, const py::array& teacher,
                                             std::vector<double> temperatures,
                                             const py::object& mask, int threads) {
  kd::MlkdParams p = mlkd(student, temperatures, mask);
  p.student = rows_of(student, "student"), p.teacher = rows_of(teacher, "teacher");
  p.in_double = p.student.dtype == kd::DType::float64 || p.teacher.dtype == kd::DType::float64;
  py::array soft = like(p.in_double, {p.temperatures, 2, p.rows, p.classes});
  py::array kl = like(p.in_double, {p.rows});
  p.soft = soft.mutable_data(), p.kl = kl.mutable_data();
  py::gil_scoped_release release;
  split_rows(p.rows, p.classes * p.temperatures, threads,
             [&](int64_t a, int64_t b) { kd::kernels().mlkd_softmax(p, a, b); });
  return {soft, kl};
}

std::tuple<double, py::array, py::array> mlkd_relate(const py::array& soft,
                                                     std::vector<double> weights,
                                                     const py::object& samples,
                                                     const py::object& classes, int threads) {
  kd::MlkdRelations p;
  p.temperatures = soft.shape(0), p.rows = soft.shape(2), p.classes = soft.shape(3);
  p.in_double = dtype_of(soft, "soft") == kd::DType::float64;
  p.row_weight = weights.at(0), p.column_weight = weights.at(1);
  p.soft = soft.data();
  if (!samples.is_none()) p.samples = samples.cast<py::array>().data();
  if (!classes.is_none()) p.columns = classes.cast<py::array>().data();
  py::array student = like(p.in_double, {p.temperatures, p.rows, p.classes});
  py::array teacher = like(p.in_double, {p.temperatures, p.rows, p.classes});
  p.grad_student = student.mutable_data(), p.grad_teacher = teacher.mutable_data();
  py::gil_scoped_release release;
  const double loss = kd::Relations(p).run(
      [threads](int64_t tasks, const auto& f) { split_tasks(tasks, threads, f); });
  return {loss, student, teacher};
}

// `grad` is filled; row_factor: None or float64 (N,).
void mlkd_gradient(py::array grad, const py::array& soft, const py::object& relations,
                   const py::array& row_weight, std::vector<double> temperatures, bool of_teacher,
                   const py::object& mask, const py::object& row_factor, int threads) {
  kd::MlkdParams p = mlkd(grad, temperatures, mask);
  p.in_double = dtype_of(soft, "soft") == kd::DType::float64;
  p.soft = const_cast<void*>(soft.data());
  if (!relations.is_none()) p.relations = relations.cast<py::array>().data();
  p.row_weight = row_weight.data();
  p.of_teacher = of_teacher;
  p.grad = rows_of(grad, "grad");
  if (!row_factor.is_none())
    p.row_factor = row_factor.cast<py::array_t<double>>().mutable_data();
  py::gil_scoped_release release;
  split_rows(p.rows, p.classes * p.temperatures, threads,
             [&](int64_t a, int64_t b) { kd::kernels().mlkd_gradient(p, a, b); });
}

}  // namespace

void bind_batchwise(py::module_& m) {
  m.def("dist", &dist);
  m.def("mlkd_softmax", &mlkd_softmax);
  m.def("mlkd_relate", &mlkd_relate);
  m.def("mlkd_gradient", &mlkd_gradient);
}

}  // namespace kd::python
