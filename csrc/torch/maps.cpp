// SPDX-License-Identifier: Apache-2.0
// kdkernels::elementwise on CPU tensors. The schema is defined in kdkernels/ops/maps/elementwise.py.
#include "tensors.h"

#include <memory>
#include <tuple>

namespace {

using namespace kd::torch_binding;

kd::Rows as_one_row(const Tensor& t, bool wanted = true) {
  kd::Rows row;
  row.dtype = dtype_of(t);
  if (wanted) row.data = t.mutable_data_ptr();
  return row;
}

// (B, C, ...) maps, contiguous or channels-last, as rows, and with them the parameter: of their
// shape but for sizes of 1, dense, its spatial sizes all there or all 1.
void describe(kd::ElementParams& p, const Tensor& maps, const std::optional<Tensor>& parameter) {
  int64_t places = 1, strides[3] = {0, 0, 0};
  for (int64_t d = 2; d < maps.dim(); d++) places *= maps.size(d);
  if (parameter) p.parameter = as_one_row(*parameter);
  for (int64_t d = 0; parameter && d < parameter->dim(); d++)
    if (parameter->size(d) > 1) strides[d < 2 ? d : 2] = parameter->stride(d);
  STD_TORCH_CHECK(
      kd::lay_out(p, maps.size(0), maps.size(1), places, !maps.is_contiguous(), strides),
      "kdkernels: the parameter does not lie as the maps do");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> elementwise(
    Tensor student, Tensor teacher, std::optional<Tensor> parameter, double factor,
    std::vector<double> numbers, std::vector<int64_t> choices, int64_t grads) {
  kd::ElementParams p;
  static_cast<kd::ElementNumbers&>(p) = unpack<kd::ElementNumbers>(numbers);
  static_cast<kd::ElementChoices&>(p) = unpack<kd::ElementChoices>(choices);
  STD_TORCH_CHECK(p.kind >= kd::ElementKind::square && p.kind < kd::ElementKind::count,
                  "kdkernels: unknown kind of elementwise loss");
  p.student = as_one_row(student), p.teacher = as_one_row(teacher);
  describe(p, student, parameter);
  const bool in_double =
      p.student.dtype == kd::DType::float64 || p.teacher.dtype == kd::DType::float64;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!parameter || parameter->scalar_type() == dtype,
                  "kdkernels: the parameter must have the type that is accumulated in");
  const auto none = [&] { return nothing(student.scalar_type()); };
  const Tensor grad_student = grads & 1 ? dense_gradient_for(student, true) : none();
  const Tensor grad_teacher = grads & 2 ? dense_gradient_for(teacher, true) : none();
  p.grad_student = as_one_row(grad_student, grads & 1);
  p.grad_teacher = as_one_row(grad_teacher, grads & 2);
  p.factor = factor;

  const int64_t tasks = kd::element_tasks(p);
  std::vector<double> losses(tasks), slopes;
  p.loss = losses.data();
  if (grads & 4) {
    STD_TORCH_CHECK(parameter->numel() == parameter->size(1),
                    "kdkernels: only a parameter per channel has a gradient");
    slopes.resize(kd::element_slopes(p));
    (p.parameter.class_stride == 1 ? p.column_slope : p.row_slope) = slopes.data();
  }
  const auto& kernel = kd::kernels().elementwise;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t a, int64_t b) { kernel(p, a, b); });
  double loss = 0;  // in the order of the tasks, whatever thread each ran on
  for (const double one : losses) loss += one;
  Tensor grad_parameter = none();
  if (grads & 4) {
    const size_t channels = parameter->size(1);
    std::vector<double> by_channel(channels);
    for (size_t i = 0; i < slopes.size(); i++) by_channel[i % channels] += slopes[i];
    grad_parameter =
        stored(by_channel.data(), leading(*parameter, parameter->dim()), dtype, factor);
  }
  return {stored(&loss, {}, dtype, factor), grad_student, grad_teacher, grad_parameter};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("elementwise", TORCH_BOX(&elementwise)); }
