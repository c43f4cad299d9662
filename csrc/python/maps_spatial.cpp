// SPDX-License-Identifier: Apache-2.0
#include "../kd/cpu/maps/axis.h"

#include <memory>

#include "arrays.h"

namespace kd::python {
namespace {

// (B, C, H, W), contiguous or else channels-last; None: rows of no data.
kd::Maps maps_of(const py::object& o, const char* name) {
  kd::Maps maps;
  if (o.is_none()) return maps;
  const auto a = o.cast<py::array>();
  maps.channels = a.shape(1), maps.positions = a.shape(2) * a.shape(3);
  maps.channels_last = !(a.flags() & py::array::c_style);
  const int64_t length = maps.channels_last ? maps.channels : maps.positions;
  maps.rows.data = const_cast<void*>(a.data());
  maps.rows.dtype = dtype_of(a, name);
  maps.rows.inner = std::max<int64_t>(a.size() / length, 1);
  maps.rows.inner_stride = length;
  return maps;
}

// Tasks that leave one number each: the sum of these.
template <class F>
double sum_of_tasks(int64_t tasks, int threads, double*& losses, const F& f) {
  const std::unique_ptr<double[]> each(new double[tasks]);
  losses = each.get();
  py::gil_scoped_release release;
  split_tasks(tasks, threads, f);
  double loss = 0;
  for (int64_t i = 0; i < tasks; i++) loss += each[i];
  return loss;
}

// The loss; gradients, None or like the maps, are filled.
double spatial_attention(const py::array& student, const py::array& teacher, double factor,
                         std::vector<int64_t> choices, const py::object& grad_student,
                         const py::object& grad_teacher, int threads) {
  kd::SpatialAttentionParams p;
  static_cast<kd::SpatialAttentionChoices&>(p) = unpack<kd::SpatialAttentionChoices>(choices);
  p.samples = student.shape(0), p.factor = factor;
  p.student = maps_of(student, "student"), p.teacher = maps_of(teacher, "teacher");
  p.grad_student = maps_of(grad_student, "grad_student");
  p.grad_teacher = maps_of(grad_teacher, "grad_teacher");
  const auto run = [&](int64_t a, int64_t b) { kd::kernels().spatial_attention(p, a, b); };
  return factor * sum_of_tasks(p.samples, threads, p.sample_loss, run);
}

// Likewise, of maps that lie alike.
double pyramid(const py::array& student, const py::array& teacher, double factor,
               std::vector<double> weights, std::vector<int64_t> levels,
               const py::object& grad_student, const py::object& grad_teacher, int threads) {
  if (weights.size() != levels.size() + 1) throw py::value_error("a weight per level, and one");
  kd::PyramidParams p;
  p.samples = student.shape(0), p.channels = student.shape(1), p.factor = factor;
  const kd::Axis y(student.shape(2), levels, p.y), x(student.shape(3), levels, p.x);
  const kd::Maps s = maps_of(student, "student"), t = maps_of(teacher, "teacher");
  if (s.channels_last != t.channels_last) throw py::value_error("maps must lie alike");
  p.channels_last = s.channels_last, p.student = s.rows, p.teacher = t.rows;
  p.grad_student = maps_of(grad_student, "grad_student").rows;
  p.grad_teacher = maps_of(grad_teacher, "grad_teacher").rows;
  p.levels = levels.size(), p.level = levels.data(), p.weight = weights.data();
  const int64_t tasks = p.samples * kd::pyramid_tasks_per_sample(p);
  const auto run = [&](int64_t a, int64_t b) { kd::kernels().pyramid(p, a, b); };
  return factor * sum_of_tasks(tasks, threads, p.task_loss, run);
}

}  // namespace

void bind_maps_spatial(py::module_& m) {
  m.def("spatial_attention", &spatial_attention);
  m.def("pyramid", &pyramid);
}

}  // namespace kd::python
