// SPDX-License-Identifier: Apache-2.0
// kdkernels::sparse on CPU tensors. The schema is defined in kdkernels/ops/sparse.py.
#include "tensors.h"

#include <memory>
#include <tuple>

namespace {

using namespace kd::torch_binding;

void refuse_faults(const kd::TopKParams& p) {
  for (int64_t i = 0; i < p.rows; i++) {
    if (p.faults[i] == kd::Fault::none) continue;
    STD_TORCH_CHECK(p.faults[i] == kd::Fault::duplicate, "topk_indices must be in [0, ", p.classes,
                    ") where topk_values is not -inf; row ", i, " has others.");
    STD_TORCH_CHECK(false, "topk_indices must be distinct in a row where topk_values is not -inf; ",
                    "row ", i, " repeats one.");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse(
    Tensor student, Tensor values, Tensor indices, std::vector<double> numbers,
    std::vector<int64_t> choices, int64_t grads, std::optional<Tensor> labels,
    std::optional<Tensor> mask, std::optional<Tensor> row_weight,
    std::optional<Tensor> temperatures, std::optional<Tensor> teacher_temperatures,
    std::optional<Tensor> logsumexp) {
  kd::TopKParams p;
  static_cast<kd::TopKNumbers&>(p) = unpack<kd::TopKNumbers>(numbers);
  static_cast<kd::TopKChoices&>(p) = unpack<kd::TopKChoices>(choices);
  Tensor keep_student, keep_values, keep_labels;
  describe_rows(p, student, labels, mask, row_weight, p.reduction, p.ignore_index, keep_labels);
  p.student = rows_of(student, keep_student);
  p.values = rows_of(values, keep_values);
  p.k = values.size(values.dim() - 1);
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.tau_s = scalar_of(temperatures, p.temperature);
  p.tau_t = p.teacher_temperature == 0 && !teacher_temperatures
                ? p.tau_s
                : scalar_of(teacher_temperatures, p.teacher_temperature);
  p.logsumexp = scalar_of(logsumexp, 0);

  const bool in_double =
      p.student.dtype == kd::DType::float64 || p.values.dtype == kd::DType::float64;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_student = gradient_for(student, grads & of_student, p.grad_student);
  Tensor grad_values = gradient_for(values, grads & of_teacher, p.grad_values);
  const std::unique_ptr<double[]> row_loss(new double[p.rows]);
  const std::unique_ptr<double[]> row_grads(grads & of_rows ? new double[5 * p.rows] : nullptr);
  const std::unique_ptr<kd::Fault[]> faults(new kd::Fault[p.rows]);
  p.row_loss = row_loss.get();
  p.row_grads = row_grads.get();
  p.faults = faults.get();

  const auto& kernel = kd::kernels().sparse;
  torch::stable::parallel_for(0, p.rows, kd::rows_per_task(p.classes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  refuse_faults(p);
  return {reduced(p, student, p.reduction, dtype), grad_student, grad_values,
          p.row_grads ? stored(p.row_grads, {5, p.rows}, dtype) : nothing(dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("sparse", TORCH_BOX(&sparse)); }
