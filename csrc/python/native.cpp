// SPDX-License-Identifier: Apache-2.0
// The CPU kernels on NumPy arrays: no torch, the same bits. kdkernels/numpy is its front.
#include "arrays.h"

namespace kd::python {
void bind_attention(py::module_& m);
void bind_batchwise(py::module_& m);
void bind_contrast(py::module_& m);
void bind_ensemble(py::module_& m);
void bind_maps(py::module_& m);
void bind_maps_spatial(py::module_& m);
void bind_relation(py::module_& m);
void bind_rowwise(py::module_& m);
void bind_sparse(py::module_& m);
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "The CPU kernels on NumPy arrays; use kdkernels.numpy.";
  m.def("isa", [] { return kd::kernels().isa; }, "The ISA level in use.");
  m.attr("kinds") = static_cast<int>(kd::Kind::count);
  m.attr("half_boost") = kd::half_boost;
  kd::python::bind_attention(m);
  kd::python::bind_batchwise(m);
  kd::python::bind_contrast(m);
  kd::python::bind_ensemble(m);
  kd::python::bind_maps(m);
  kd::python::bind_maps_spatial(m);
  kd::python::bind_relation(m);
  kd::python::bind_rowwise(m);
  kd::python::bind_sparse(m);
}
