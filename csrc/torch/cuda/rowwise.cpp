// SPDX-License-Identifier: Apache-2.0
// kdkernels::rowwise on CUDA tensors. Everything is enqueued on the current stream, and no value of
// the device is looked at.
#include "../tensors.h"

#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "../../kd/contract.h"
#include "../../kd/cuda/rowwise.h"

namespace {

using namespace kd::torch_binding;

#define KD_ROWWISE_ARGUMENTS                                                                  \
  std::vector<double> numbers, std::vector<int64_t> choices, int64_t grads,                   \
      std::optional<Tensor> labels, std::optional<Tensor> mask,                               \
      std::optional<Tensor> row_weight, std::optional<Tensor> temperatures,                   \
      std::optional<Tensor> teacher_temperatures, std::optional<Tensor> targets
#define KD_ROWWISE_PASSED \
  numbers, choices, grads, labels, mask, row_weight, temperatures, teacher_temperatures, targets

Tensor on_device_of(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1) strides[d] = stride;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.size(), shape.data(), strides.data(), type, aoti_torch_device_type_cuda(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor device_gradient_for(const Tensor& logits, bool wanted, kd::Rows& rows) {
  const Tensor grad =
      on_device_of(logits, wanted ? leading(logits, logits.dim()) : std::vector<int64_t>{0},
                   logits.scalar_type());
  if (wanted) as_rows(grad, rows);
  return grad;
}

struct Result {
  Tensor loss, grad_teacher, rows;
};

// `p` holds the student and its gradient.
Result run(kd::cuda::RowwiseCall& p, const Tensor& student, const Tensor& teacher,
           KD_ROWWISE_ARGUMENTS) {
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  Tensor keep_teacher, keep_probs;
  p.classes = student.size(student.dim() - 1);
  p.rows = p.classes ? student.numel() / p.classes : 0;
  if (labels && labels->scalar_type() == ScalarType::Long)
    p.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  else if (labels)
    p.label_probs = rows_of(*labels, keep_probs);
  if (mask) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  p.row_weight = scalar_of(row_weight, 1);
  p.teacher = rows_of(teacher, keep_teacher);
  p.teacher_classes = teacher.size(teacher.dim() - 1);
  p.teacher_first = p.teacher_classes == p.classes ? p.first : 0;
  p.targets = targets ? static_cast<const int64_t*>(targets->const_data_ptr()) : p.labels;
  p.tau_s = scalar_of(temperatures, p.temperature);
  p.tau_t = p.teacher_temperature == 0 && !teacher_temperatures
                ? p.tau_s
                : scalar_of(teacher_temperatures, p.teacher_temperature);
  p.parts = grads & of_parts;
  // Temperatures that are no tensors need no gradient.
  p.slopes = (grads & of_rows) && (temperatures || teacher_temperatures);

  const bool averaged = p.reduction == batchmean || p.reduction == mean;
  const bool some_rows = p.mask || p.labels;
  p.counted = averaged && some_rows;
  if (averaged && !some_rows && p.rows) p.factor = 1. / p.rows;
  if (p.reduction == mean) p.factor /= p.width ? p.width : p.classes;
  p.by_row = p.reduction == none;

  const ScalarType dtype = p.in_double() ? ScalarType::Double : ScalarType::Float;
  Tensor loss =
      on_device_of(student, p.by_row ? leading(student, student.dim() - 1) : std::vector<int64_t>{},
                   dtype);
  const int64_t numbers_a_row = p.parts ? 6 : 4;
  const Tensor rows = on_device_of(
      student, grads & of_rows ? std::vector<int64_t>{numbers_a_row, p.rows} : std::vector<int64_t>{0},
      dtype);
  const Tensor grad_teacher = device_gradient_for(teacher, grads & of_teacher, p.grad_teacher);
  if (p.rows == 0) {
    if (!p.by_row) torch::stable::zero_(loss);
    return {loss, grad_teacher, rows};
  }
  kd::cuda::plan(p);
  const Tensor partial = on_device_of(student, {p.groups + p.double_groups + 2}, ScalarType::Double);
  const Tensor inexact = on_device_of(student, {p.rows}, ScalarType::Byte);
  p.loss = loss.mutable_data_ptr();
  p.row_grads = grads & of_rows ? static_cast<double*>(rows.mutable_data_ptr()) : nullptr;
  p.partial = static_cast<double*>(partial.mutable_data_ptr());
  p.count = static_cast<int64_t*>(static_cast<void*>(p.partial + p.groups + p.double_groups));
  p.finished = static_cast<int*>(static_cast<void*>(p.count + 1));
  p.inexact = static_cast<uint8_t*>(inexact.mutable_data_ptr());

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(student.get_device_index(), &stream));
  kd::cuda::rowwise(p, stream);
  return {loss, grad_teacher, rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rowwise(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  kd::cuda::RowwiseCall p;
  Tensor keep;
  p.student = rows_of(student, keep);
  const Tensor grad = device_gradient_for(student, grads & of_student, p.grad_student);
  Result r = run(p, student, teacher, KD_ROWWISE_PASSED);
  return {r.loss, grad, r.grad_teacher, r.rows};
}

std::tuple<Tensor, Tensor, Tensor> rowwise_inplace(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  kd::cuda::RowwiseCall p;
  STD_TORCH_CHECK(as_rows(student, p.student),
                  "kdkernels: inplace needs student logits of at most two nested row strides");
  if (grads & of_student) p.grad_student = p.student;
  Result r = run(p, student, teacher, KD_ROWWISE_PASSED);
  return {r.loss, r.grad_teacher, r.rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("rowwise", TORCH_BOX(&rowwise));
  m.impl("rowwise_inplace", TORCH_BOX(&rowwise_inplace));
}
