// SPDX-License-Identifier: Apache-2.0
// kdkernels::dist and mlkd_* on CPU tensors. The schemas are defined in
// kdkernels/ops/batchwise.py.
#include "tensors.h"

#include "../kd/cpu/correlations.h"
#include "../kd/cpu/relations.h"

#include <memory>
#include <tuple>

namespace {

using namespace kd::torch_binding;
using torch::stable::parallel_for;

enum MoreGradients { of_temperature = 8 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dist(
    Tensor student, Tensor teacher, std::vector<double> numbers, std::vector<int64_t> choices,
    int64_t grads, std::optional<Tensor> mask, std::optional<Tensor> temperature) {
  kd::DistParams p;
  static_cast<kd::DistNumbers&>(p) = unpack<kd::DistNumbers>(numbers);
  static_cast<kd::DistChoices&>(p) = unpack<kd::DistChoices>(choices);
  Tensor keep_student, keep_teacher;
  p.student = rows_of(student, keep_student), p.teacher = rows_of(teacher, keep_teacher);
  p.classes = student.size(student.dim() - 1);
  p.rows = p.counted = student.numel() / p.classes;
  if (mask) {
    p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.counted = std::count_if(p.mask, p.mask + p.rows, [](uint8_t m) { return m != 0; });
  }
  if (temperature) {
    const kd::RowScalar tau = scalar_of(temperature, 1);
    p.temperature = tau.is_double ? *static_cast<const double*>(tau.data)
                                  : *static_cast<const float*>(tau.data);
  }
  const ScalarType dtype = kd::in_double(p) ? ScalarType::Double : ScalarType::Float;
  Tensor grad_student = gradient_for(student, grads & of_student, p.grad_student);
  Tensor grad_teacher = gradient_for(teacher, grads & of_teacher, p.grad_teacher);

  const std::unique_ptr<double[]> factors(grads & of_rows ? new double[2 * p.rows] : nullptr);
  p.row_factor = factors.get();
  p.temperature_grad = grads & of_temperature;
  const kd::Correlations found(p, [](int64_t tasks, const auto& f) {
    parallel_for(0, tasks, 1, f);
  });
  return {stored(&found.loss, {}, dtype), grad_student, grad_teacher,
          p.temperature_grad ? stored(&found.temperature_slope, {1}, dtype) : nothing(dtype),
          p.row_factor ? stored(p.row_factor, {2, p.rows}, dtype) : nothing(dtype)};
}

kd::MlkdParams mlkd(const Tensor& logits, const std::vector<double>& temperatures,
                    const std::optional<Tensor>& mask) {
  kd::MlkdParams p;
  p.classes = logits.size(logits.dim() - 1);
  p.rows = logits.numel() / p.classes;
  p.temperatures = temperatures.size(), p.temperature = temperatures.data();
  STD_TORCH_CHECK(p.temperatures <= kd::most_temperatures, "kdkernels: too many temperatures");
  if (mask) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  return p;
}

std::tuple<Tensor, Tensor> mlkd_softmax(Tensor student, Tensor teacher,
                                        std::vector<double> temperatures,
                                        std::optional<Tensor> mask) {
  kd::MlkdParams p = mlkd(student, temperatures, mask);
  Tensor keep_student, keep_teacher;
  p.student = rows_of(student, keep_student), p.teacher = rows_of(teacher, keep_teacher);
  p.in_double = p.student.dtype == kd::DType::float64 || p.teacher.dtype == kd::DType::float64;
  const ScalarType dtype = p.in_double ? ScalarType::Double : ScalarType::Float;
  Tensor soft = contiguous({p.temperatures, 2, p.rows, p.classes}, dtype);
  Tensor kl = contiguous({p.rows}, dtype);
  p.soft = soft.mutable_data_ptr(), p.kl = kl.mutable_data_ptr();
  kd::advise_huge_pages(p.soft, soft.numel() * (p.in_double ? 8 : 4));
  const auto& kernel = kd::kernels().mlkd_softmax;
  parallel_for(0, p.rows, kd::rows_per_task(p.classes * p.temperatures),
               [&](int64_t a, int64_t b) { kernel(p, a, b); });
  return {soft, kl};
}

void scale_weights(std::vector<double>& weights, const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(weights.size() == 2, "kdkernels: there are two weights of relations");
  for (int i = 0; scale && i < 2; i++)
    weights[i] *= scale->scalar_type() == ScalarType::Double
                      ? static_cast<const double*>(scale->const_data_ptr())[i]
                      : static_cast<const float*>(scale->const_data_ptr())[i];
}

std::tuple<Tensor, Tensor, Tensor> mlkd_relate(Tensor soft, std::vector<double> weights,
                                               int64_t grads, std::optional<Tensor> scale,
                                               std::optional<Tensor> samples,
                                               std::optional<Tensor> classes) {
  kd::MlkdRelations p;
  p.temperatures = soft.size(0), p.rows = soft.size(2), p.classes = soft.size(3);
  const ScalarType dtype = soft.scalar_type();
  p.in_double = dtype == ScalarType::Double;
  scale_weights(weights, scale);
  p.row_weight = weights[0], p.column_weight = weights[1];
  p.soft = soft.const_data_ptr();
  if (samples) p.samples = samples->const_data_ptr();
  if (classes) p.columns = classes->const_data_ptr();
  Tensor student = nothing(dtype), teacher = nothing(dtype);
  const auto gradient = [&](bool wanted, Tensor& out, void*& to) {
    if (!wanted) return;
    out = contiguous({p.temperatures, p.rows, p.classes}, dtype);
    to = out.mutable_data_ptr();
  };
  gradient(grads & of_student, student, p.grad_student);
  gradient(grads & of_teacher, teacher, p.grad_teacher);
  const double loss = kd::Relations(p).run([](int64_t tasks, const auto& f) {
    parallel_for(0, tasks, 1, f);
  });
  return {stored(&loss, {}, dtype), student, teacher};
}

std::tuple<Tensor, Tensor> mlkd_gradient(Tensor logits, Tensor soft,
                                         std::optional<Tensor> relations, Tensor row_weight,
                                         std::vector<double> temperatures, bool of_teacher,
                                         std::optional<Tensor> mask) {
  kd::MlkdParams p = mlkd(logits, temperatures, mask);
  p.in_double = soft.scalar_type() == ScalarType::Double;
  p.soft = soft.mutable_data_ptr();
  if (relations) p.relations = relations->const_data_ptr();
  p.row_weight = row_weight.const_data_ptr();
  p.of_teacher = of_teacher;
  Tensor grad = gradient_for(logits, true, p.grad);
  const bool half = p.grad.dtype == kd::DType::float16;
  const std::unique_ptr<double[]> factors(half ? new double[p.rows] : nullptr);
  p.row_factor = factors.get();
  const auto& kernel = kd::kernels().mlkd_gradient;
  parallel_for(0, p.rows, kd::rows_per_task(p.classes * p.temperatures),
               [&](int64_t a, int64_t b) { kernel(p, a, b); });
  const ScalarType dtype = p.in_double ? ScalarType::Double : ScalarType::Float;
  return {grad, half ? stored(p.row_factor, {p.rows}, dtype) : nothing(dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("dist", TORCH_BOX(&dist));
  m.impl("mlkd_softmax", TORCH_BOX(&mlkd_softmax));
  m.impl("mlkd_relate", TORCH_BOX(&mlkd_relate));
  m.impl("mlkd_gradient", TORCH_BOX(&mlkd_gradient));
}
