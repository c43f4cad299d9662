// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

// indices: int64 (N, k), contiguous; faults: uint8 (N,); row_grads: (5, N).
void sparse(const py::array& student, const py::array& values,
            const py::array_t<int64_t>& indices, std::vector<double> numbers,
            std::vector<int64_t> choices, const py::object& labels, const py::object& mask,
            const py::object& row_weight, const py::object& temperature,
            const py::object& teacher_temperature, const py::object& logsumexp, double factor,
            py::array_t<double> row_loss, py::array_t<uint8_t> faults,
            const py::array& grad_student, const py::array& grad_values,
            const py::object& row_grads, int threads) {
  kd::TopKParams p;
  static_cast<kd::TopKNumbers&>(p) = unpack<kd::TopKNumbers>(numbers);
  static_cast<kd::TopKChoices&>(p) = unpack<kd::TopKChoices>(choices);
  describe_rows(p, student, labels, mask, row_weight, factor, row_loss, row_grads);
  p.student = rows_of(student, "student"), p.values = rows_of(values, "topk_values");
  p.k = values.shape(1), p.indices = indices.data();
  p.tau_s = scalar_of(temperature), p.tau_t = scalar_of(teacher_temperature);
  p.logsumexp = scalar_of(logsumexp);
  p.grad_student = rows_of(grad_student, "grad_student");
  p.grad_values = rows_of(grad_values, "grad_values");
  p.faults = reinterpret_cast<kd::Fault*>(faults.mutable_data());
  py::gil_scoped_release release;
  const auto& kernel = kd::kernels().sparse;
  split_rows(p.rows, p.classes, threads,
             [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void bind_sparse(py::module_& m) { m.def("sparse", &sparse); }

}  // namespace kd::python
