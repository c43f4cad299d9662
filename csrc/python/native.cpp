// SPDX-License-Identifier: Apache-2.0
// The CPU kernels on NumPy arrays: no torch, the same bits. kdkernels/numpy.py is its front.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../kd/cpu/kernels.h"

namespace py = pybind11;

namespace {

// By equivalence: an array that was unpickled has a dtype object of its own.
kd::DType dtype_of(const py::array& a, const char* name) {
  if (py::isinstance<py::array_t<float>>(a)) return kd::DType::float32;
  if (py::isinstance<py::array_t<double>>(a)) return kd::DType::float64;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2) return kd::DType::float16;
  throw py::type_error(std::string(name) + " must be float64, float32 or float16");
}

kd::Rows rows_of(const py::array& a, const char* name) {
  kd::Rows rows;
  rows.data = const_cast<void*>(a.data());
  rows.dtype = dtype_of(a, name);
  rows.inner = std::max<int64_t>(a.shape(0), 1);
  rows.inner_stride = a.strides(0) / a.itemsize();
  rows.class_stride = a.strides(1) / a.itemsize();
  return rows;
}

// `f` on all rows, split over `threads` threads.
template <class F>
void split_rows(int64_t rows, int64_t classes, int threads, const F& f) {
  const int64_t tasks = std::min<int64_t>(threads, rows / kd::rows_per_task(classes));
  if (tasks <= 1) return f(0, rows);
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < tasks; i++)
    pool.emplace_back([&, i] { f(rows * i / tasks, rows * (i + 1) / tasks); });
  for (auto& thread : pool) thread.join();
}

// All arrays are (N, C) or (N,), validated by kdkernels/numpy.py; outputs are filled in place.
void rowwise(const py::array& student, const py::array& teacher, const py::object& labels,
             const py::object& mask, const py::object& row_weight, const py::object& temperature,
             const py::object& teacher_temperature, int kind, double alpha, double beta,
             double kd_weight, double ce_weight, double label_smoothing, int64_t ignore_index,
             bool t2, double factor, py::array_t<double> row_loss, const py::object& grad_student,
             const py::object& grad_teacher, const py::object& row_grads, int threads) {
  kd::RowwiseParams p;
  p.rows = student.shape(0), p.classes = student.shape(1);
  p.student = rows_of(student, "student"), p.teacher = rows_of(teacher, "teacher");
  if (!labels.is_none()) {
    const auto array = labels.cast<py::array>();
    if (array.ndim() == 1) p.labels = static_cast<const int64_t*>(array.data());
    else p.label_probs = rows_of(array, "labels");
  }
  if (!mask.is_none()) p.mask = static_cast<const uint8_t*>(mask.cast<py::array>().data());
  const auto scalar = [](const py::object& o) {
    kd::RowScalar s;
    if (o.is_none()) return s;
    const auto array = o.cast<py::array_t<double>>();
    s.data = array.data(), s.is_double = true, s.stride = array.size() == 1 ? 0 : 1;
    return s;
  };
  p.row_weight = scalar(row_weight), p.temperature = scalar(temperature);
  p.teacher_temperature = scalar(teacher_temperature);
  p.kind = static_cast<kd::Kind>(kind);
  p.alpha = alpha, p.beta = beta, p.kd_weight = kd_weight, p.ce_weight = ce_weight;
  p.label_smoothing = label_smoothing, p.ignore_index = ignore_index, p.t2 = t2;
  p.factor = factor;
  p.row_loss = row_loss.mutable_data();
  if (!grad_student.is_none()) p.grad_student = rows_of(grad_student.cast<py::array>(), "grad");
  if (!grad_teacher.is_none()) p.grad_teacher = rows_of(grad_teacher.cast<py::array>(), "grad");
  if (!row_grads.is_none()) p.row_grads = row_grads.cast<py::array_t<double>>().mutable_data();
  py::gil_scoped_release release;
  const auto& kernel = kd::kernels().rowwise;
  split_rows(p.rows, p.classes, threads,
             [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The CPU kernels on NumPy arrays; use kdkernels.numpy.";
  m.def("isa", [] { return kd::kernels().isa; }, "The ISA level in use.");
  m.attr("kinds") = static_cast<int>(kd::Kind::count);
  m.attr("half_boost") = kd::half_boost;
  m.def("rowwise", &rowwise);
}
