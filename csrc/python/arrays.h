// SPDX-License-Identifier: Apache-2.0
// NumPy arrays as the kernels take them. All are (N, C) or (N,), validated by kdkernels/numpy;
// outputs are filled in place.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../kd/cpu/kernels.h"

namespace kd::python {

namespace py = pybind11;

// By equivalence: an array that was unpickled has a dtype object of its own.
inline kd::DType dtype_of(const py::array& a, const char* name) {
  if (py::isinstance<py::array_t<float>>(a)) return kd::DType::float32;
  if (py::isinstance<py::array_t<double>>(a)) return kd::DType::float64;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2) return kd::DType::float16;
  throw py::type_error(std::string(name) + " must be float64, float32 or float16");
}

inline kd::Rows rows_of(const py::array& a, const char* name) {
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

// Of tasks that are each worth a thread.
template <class F>
void split_tasks(int64_t tasks, int threads, const F& f) {
  split_rows(tasks, kd::grain, threads, f);
}

inline kd::Rows rows_or_none(const py::object& o, const char* name) {
  return o.is_none() ? kd::Rows{} : rows_of(o.cast<py::array>(), name);
}

// float64 of one element or one a row; None: 1.
inline kd::RowScalar scalar_of(const py::object& o) {
  kd::RowScalar s;
  if (o.is_none()) return s;
  const auto array = o.cast<py::array_t<double>>();
  s.data = array.data(), s.is_double = true, s.stride = array.size() == 1 ? 0 : 1;
  return s;
}

// A struct of 8-byte fields from all of them.
template <class T, class V>
T unpack(const std::vector<V>& values) {
  static_assert(sizeof(V) == 8);
  if (values.size() * 8 != sizeof(T)) throw py::value_error("kdkernels: wrong number of fields");
  T out;
  std::memcpy(static_cast<void*>(&out), values.data(), sizeof(T));
  return out;
}

inline void describe_rows(kd::RowLoss& p, const py::array& student, const py::object& labels,
                          const py::object& mask, const py::object& row_weight, double factor,
                          py::array_t<double> row_loss, const py::object& row_grads) {
  p.rows = student.shape(0), p.classes = student.shape(1);
  if (!labels.is_none()) {
    const auto array = labels.cast<py::array>();
    if (array.ndim() == 1) p.labels = static_cast<const int64_t*>(array.data());
    else p.label_probs = rows_of(array, "labels");
  }
  if (!mask.is_none()) p.mask = static_cast<const uint8_t*>(mask.cast<py::array>().data());
  p.row_weight = scalar_of(row_weight);
  p.factor = factor;
  p.row_loss = row_loss.mutable_data();
  if (!row_grads.is_none()) p.row_grads = row_grads.cast<py::array_t<double>>().mutable_data();
}

}  // namespace kd::python
