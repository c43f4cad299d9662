// SPDX-License-Identifier: Apache-2.0
// kdkernels::ensemble on CPU tensors. The schema is defined in kdkernels/ops/ensemble.py.
#include "tensors.h"

#include <memory>
#include <tuple>

namespace {

using namespace kd::torch_binding;

constexpr int64_t of_weights = 8;  // GRAD_WEIGHTS in kdkernels/ops/ensemble.py

// Weight m of (M, 1) or (M, N); none: 1 / M.
kd::RowScalar weight_of(const std::optional<Tensor>& weights, int64_t m, int64_t count) {
  kd::RowScalar scalar;
  scalar.value = 1.0 / count;
  if (!weights) return scalar;
  const int64_t columns = weights->size(1);
  scalar.is_double = weights->scalar_type() == ScalarType::Double;
  scalar.data = static_cast<const char*>(weights->const_data_ptr()) +
                m * columns * (scalar.is_double ? sizeof(double) : sizeof(float));
  scalar.stride = columns > 1;
  return scalar;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ensemble(
    Tensor student, std::vector<Tensor> teachers, bool mixture, std::vector<double> numbers,
    std::vector<int64_t> choices, int64_t grads, std::optional<Tensor> labels,
    std::optional<Tensor> mask, std::optional<Tensor> row_weight,
    std::optional<Tensor> temperatures, std::optional<Tensor> teacher_temperatures,
    std::optional<Tensor> weights) {
  kd::EnsembleParams p;
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  Tensor keep, keep_probs;
  p.student = rows_of(student, keep);
  describe_rows(p, student, labels, mask, row_weight, p.reduction, p.ignore_index, keep_probs);
  p.tau_s = scalar_of(temperatures, p.temperature);
  p.tau_t = p.teacher_temperature == 0 && !teacher_temperatures
                ? p.tau_s
                : scalar_of(teacher_temperatures, p.teacher_temperature);
  Tensor grad_student = gradient_for(student, grads & of_student, p.grad_student);

  const int64_t count = teachers.size();
  std::vector<kd::EnsembleTeacher> given(count);
  std::vector<int64_t> shape = leading(student, student.dim());
  shape.insert(shape.begin(), count);
  kd::Rows grad;
  const Tensor grad_teachers = grads & of_teacher ? contiguous(shape, teachers[0].scalar_type())
                                                  : nothing(teachers[0].scalar_type());
  if (grads & of_teacher) {
    as_rows(grad_teachers, grad);
    kd::advise_huge_pages(grad.data, grad_teachers.numel() * kd::size_of(grad.dtype));
  }
  bool in_double = p.student.dtype == kd::DType::float64;
  for (int64_t m = 0; m < count; m++) {
    given[m] = {rows_of(teachers[m], teachers[m]), grad, weight_of(weights, m, count)};
    in_double = in_double || given[m].logits.dtype == kd::DType::float64;
    if (grads & of_teacher)
      given[m].grad.data = static_cast<char*>(grad.data) +
                           m * p.rows * p.classes * kd::size_of(grad.dtype);
  }
  p.teachers = given.data(), p.count = count;
  p.mixture = mixture, p.weight_grads = grads & of_weights;

  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  const int64_t per_row = 4 + count;
  const std::unique_ptr<double[]> row_loss(new double[p.rows]);
  const std::unique_ptr<double[]> row_grads(grads & of_rows ? new double[per_row * p.rows]
                                                            : nullptr);
  p.row_loss = row_loss.get();
  p.row_grads = row_grads.get();
  const auto& kernel = kd::kernels().ensemble;
  torch::stable::parallel_for(0, p.rows, kd::rows_per_task(p.classes * (1 + count)),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {reduced(p, student, p.reduction, dtype), grad_student, grad_teachers,
          p.row_grads ? stored(p.row_grads, {per_row, p.rows}, dtype) : nothing(dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("ensemble", TORCH_BOX(&ensemble)); }
