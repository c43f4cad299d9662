// SPDX-License-Identifier: Apache-2.0
// kdkernels::rowwise on CPU tensors. The schema is defined in kdkernels/ops/rowwise.py.
#include "tensors.h"

#include <memory>
#include <tuple>

namespace {

using namespace kd::torch_binding;

struct Result {
  Tensor loss, grad_teacher, rows;
};

// Arguments as in the schema.
#define KD_ROWWISE_ARGUMENTS                                                                  \
  std::vector<double> numbers, std::vector<int64_t> choices, int64_t grads,                   \
      std::optional<Tensor> labels, std::optional<Tensor> mask,                               \
      std::optional<Tensor> row_weight, std::optional<Tensor> temperatures,                   \
      std::optional<Tensor> teacher_temperatures, std::optional<Tensor> targets
#define KD_ROWWISE_PASSED \
  numbers, choices, grads, labels, mask, row_weight, temperatures, teacher_temperatures, \
      targets

// `p` holds the student and its gradient.
Result run(kd::RowwiseParams& p, const Tensor& student, const Tensor& teacher,
           KD_ROWWISE_ARGUMENTS) {
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  Tensor keep_teacher, keep_probs;
  describe_rows(p, student, labels, mask, row_weight, p.reduction, p.ignore_index, keep_probs);
  if (p.width && p.reduction == mean) p.factor *= static_cast<double>(p.classes) / p.width;
  p.teacher = rows_of(teacher, keep_teacher);
  p.teacher_classes = teacher.size(teacher.dim() - 1);
  p.teacher_first = p.teacher_classes == p.classes ? p.first : 0;
  p.targets = targets ? static_cast<const int64_t*>(targets->const_data_ptr()) : p.labels;
  p.tau_s = scalar_of(temperatures, p.temperature);
  p.tau_t = p.teacher_temperature == 0 && !teacher_temperatures
                ? p.tau_s
                : scalar_of(teacher_temperatures, p.teacher_temperature);

  const bool in_double =
      p.student.dtype == kd::DType::float64 || p.teacher.dtype == kd::DType::float64;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_teacher = gradient_for(teacher, grads & of_teacher, p.grad_teacher);
  const std::unique_ptr<double[]> row_loss(new double[p.rows]);
  p.parts = grads & of_parts;
  const int64_t numbers_a_row = p.parts ? 6 : 4;
  const std::unique_ptr<double[]> row_grads(
      grads & of_rows ? new double[numbers_a_row * p.rows] : nullptr);
  p.row_loss = row_loss.get();
  p.row_grads = row_grads.get();

  const auto& kernel = kd::kernels().rowwise;
  // Two exponentials a class: some four times what the grain's elements are.
  torch::stable::parallel_for(0, p.rows, kd::rows_per_task(4 * p.classes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {reduced(p, student, p.reduction, dtype), grad_teacher,
          p.row_grads ? stored(p.row_grads, {numbers_a_row, p.rows}, dtype) : nothing(dtype)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rowwise(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  kd::RowwiseParams p;
  Tensor keep;
  p.student = rows_of(student, keep);
  Tensor grad = gradient_for(student, grads & of_student, p.grad_student);
  Result r = run(p, student, teacher, KD_ROWWISE_PASSED);
  return {r.loss, grad, r.grad_teacher, r.rows};
}

std::tuple<Tensor, Tensor, Tensor> rowwise_inplace(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  kd::RowwiseParams p;
  STD_TORCH_CHECK(as_rows(student, p.student),
                  "kdkernels: inplace needs student logits of at most two nested row strides");
  if (grads & of_student) p.grad_student = p.student;
  Result r = run(p, student, teacher, KD_ROWWISE_PASSED);
  return {r.loss, r.grad_teacher, r.rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rowwise", TORCH_BOX(&rowwise));
  m.impl("rowwise_inplace", TORCH_BOX(&rowwise_inplace));
}
