// SPDX-License-Identifier: Apache-2.0
// kdkernels::spatial_attention and kdkernels::pyramid on CPU tensors. The schemas are defined in
// kdkernels/ops/maps.
#include "../kd/cpu/maps/axis.h"

#include <memory>

#include "tensors.h"

namespace {

using namespace kd::torch_binding;
using torch::stable::parallel_for;

// (B, C, H, W) or (B, C, P), contiguous or channels-last.
kd::Maps maps_of(const Tensor& t) {
  kd::Maps maps;
  maps.channels = t.size(1), maps.positions = 1;
  for (int64_t d = 2; d < t.dim(); d++) maps.positions *= t.size(d);
  int64_t dense = 1;
  maps.channels_last = false;
  for (int64_t d = t.dim(); d-- > 0; dense *= t.size(d))
    if (t.size(d) > 1 && t.stride(d) != dense) maps.channels_last = true;
  const int64_t length = maps.channels_last ? maps.channels : maps.positions;
  maps.rows.data = const_cast<void*>(t.const_data_ptr());
  maps.rows.dtype = dtype_of(t);
  maps.rows.inner = length ? std::max<int64_t>(t.numel() / length, 1) : 1;
  maps.rows.inner_stride = length;
  return maps;
}

Tensor gradient_like(const Tensor& t, bool wanted, kd::Maps& maps) {
  const Tensor grad = dense_gradient_for(t, wanted);
  if (wanted) maps = maps_of(grad);
  return grad;
}

ScalarType accumulated_in(const Tensor& a, const Tensor& b) {
  const bool in_double =
      a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
  return in_double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention(Tensor student, Tensor teacher, double factor,
                                              std::vector<double>, std::vector<int64_t> choices,
                                              int64_t grads) {
  kd::SpatialAttentionParams p;
  static_cast<kd::SpatialAttentionChoices&>(p) = unpack<kd::SpatialAttentionChoices>(choices);
  p.samples = student.size(0);
  p.student = maps_of(student), p.teacher = maps_of(teacher);
  p.factor = factor;
  Tensor grad_student = gradient_like(student, grads & of_student, p.grad_student);
  Tensor grad_teacher = gradient_like(teacher, grads & of_teacher, p.grad_teacher);
  const std::unique_ptr<double[]> losses(new double[p.samples]);
  p.sample_loss = losses.get();
  const auto& kernel = kd::kernels().spatial_attention;
  parallel_for(0, p.samples, kd::rows_per_task(p.student.channels * p.student.positions),
               [&](int64_t a, int64_t b) { kernel(p, a, b); });
  double loss = 0;
  for (int64_t i = 0; i < p.samples; i++) loss += losses[i];
  return {stored(&loss, {}, accumulated_in(student, teacher), factor), grad_student, grad_teacher};
}

std::tuple<Tensor, Tensor, Tensor> pyramid(Tensor student, Tensor teacher, double factor,
                                           std::vector<double> weights, std::vector<int64_t> levels,
                                           int64_t grads) {
  STD_TORCH_CHECK(weights.size() == levels.size() + 1, "kdkernels: a weight per level, and one");
  kd::PyramidParams p;
  p.samples = student.size(0), p.channels = student.size(1);
  const kd::Axis y(student.size(2), levels, p.y), x(student.size(3), levels, p.x);
  const kd::Maps s = maps_of(student), t = maps_of(teacher);
  STD_TORCH_CHECK(s.channels_last == t.channels_last, "kdkernels: maps must lie alike");
  p.channels_last = s.channels_last, p.student = s.rows, p.teacher = t.rows;
  p.levels = levels.size(), p.level = levels.data(), p.weight = weights.data();
  p.factor = factor;
  kd::Maps of_s, of_t;
  Tensor grad_student = gradient_like(student, grads & of_student, of_s);
  Tensor grad_teacher = gradient_like(teacher, grads & of_teacher, of_t);
  p.grad_student = of_s.rows, p.grad_teacher = of_t.rows;

  const int64_t tasks = p.samples * kd::pyramid_tasks_per_sample(p);
  const std::unique_ptr<double[]> losses(new double[tasks]);
  p.task_loss = losses.get();
  const auto& kernel = kd::kernels().pyramid;
  parallel_for(0, tasks, kd::rows_per_task(s.positions * kd::pyramid_channels_per_task(p)),
               [&](int64_t a, int64_t b) { kernel(p, a, b); });
  double loss = 0;
  for (int64_t i = 0; i < tasks; i++) loss += losses[i];
  return {stored(&loss, {}, accumulated_in(student, teacher), factor), grad_student, grad_teacher};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("spatial_attention", TORCH_BOX(&spatial_attention));
  m.impl("pyramid", TORCH_BOX(&pyramid));
}
