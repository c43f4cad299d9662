// SPDX-License-Identifier: Apache-2.0
// kdkernels::rowwise and what goes with it, as LibTorch stable-ABI operators on CPU tensors: one
// binary for every torch since 2.10. The schemas are defined in kdkernels/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../kd/cpu/kernels.h"
#include "../kd/cpu/pages.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

kd::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kd::DType::float32;
    case ScalarType::Double: return kd::DType::float64;
    case ScalarType::BFloat16: return kd::DType::bfloat16;
    case ScalarType::Half: return kd::DType::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "kdkernels: expected float64, float32, bfloat16 or float16 tensors");
  return kd::DType::float32;
}

// (..., C) as rows; false where the leading dimensions are more than two nested strides.
bool as_rows(const Tensor& t, kd::Rows& rows) {
  rows.data = const_cast<void*>(t.const_data_ptr());
  rows.dtype = dtype_of(t);
  const int64_t last = t.dim() - 1;
  rows.class_stride = t.stride(last);
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int level = -1;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (level >= 0 && t.stride(d) == stride[level] * size[level]) {
      size[level] *= t.size(d);
    } else {
      if (++level == 2) return false;
      size[level] = t.size(d);
      stride[level] = t.stride(d);
    }
  }
  rows.inner = size[0] > 0 ? size[0] : 1;
  rows.inner_stride = stride[0];
  rows.outer_stride = stride[1];
  return true;
}

// Rows of `t`, of a copy held in `keep` where its strides are beyond `Rows`.
kd::Rows rows_of(const Tensor& t, Tensor& keep) {
  kd::Rows rows;
  keep = t;
  if (!as_rows(keep, rows)) {
    keep = torch::stable::contiguous(t);
    as_rows(keep, rows);
  }
  return rows;
}

kd::RowScalar scalar_of(const std::optional<Tensor>& t, double value) {
  kd::RowScalar scalar;
  scalar.value = value;
  if (t) {
    scalar.data = t->const_data_ptr();
    scalar.is_double = t->scalar_type() == ScalarType::Double;
    scalar.stride = t->numel() == 1 ? 0 : 1;
  }
  return scalar;
}

enum Reduction { none, sum, batchmean, mean };  // REDUCTIONS in kdkernels/ops/rowwise.py
enum Gradients { of_student = 1, of_teacher = 2, of_rows = 4 };

// Uninitialised. Four of these are most of a small call's cost: this entry point, unlike
// `new_empty`, does not go through the dispatcher.
Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// In the place of an output that is not asked for.
Tensor nothing(ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  return empty(1, &size, &stride, dtype);
}

Tensor contiguous(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1) strides[d] = stride;
  return empty(shape.size(), shape.data(), strides.data(), dtype);
}

std::vector<int64_t> leading(const Tensor& t, int64_t dims) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < dims; d++) shape.push_back(t.size(d));
  return shape;
}

Tensor gradient_for(const Tensor& logits, bool wanted, kd::Rows& rows) {
  if (!wanted) return nothing(logits.scalar_type());
  Tensor grad = contiguous(leading(logits, logits.dim()), logits.scalar_type());
  as_rows(grad, rows);
  kd::advise_huge_pages(rows.data, grad.numel() * kd::size_of(rows.dtype));
  return grad;
}

struct Result {
  Tensor loss, grad_teacher, rows;
};

Result run(
    kd::RowwiseParams& p, const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& row_weight, const std::optional<Tensor>& temperatures,
    const std::optional<Tensor>& teacher_temperatures, double temperature,
    double teacher_temperature, int64_t reduction, int64_t grads) {
  const int64_t last = student.dim() - 1;
  p.classes = student.size(last);
  p.rows = p.classes ? student.numel() / p.classes : 0;
  Tensor keep_teacher, keep_probs;
  p.teacher = rows_of(teacher, keep_teacher);
  if (labels && labels->scalar_type() == ScalarType::Long)
    p.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  else if (labels)
    p.label_probs = rows_of(*labels, keep_probs);
  if (mask) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  p.row_weight = scalar_of(row_weight, 1);
  p.temperature = scalar_of(temperatures, temperature);
  p.teacher_temperature = teacher_temperature == 0 && !teacher_temperatures
                              ? p.temperature
                              : scalar_of(teacher_temperatures, teacher_temperature);

  int64_t count = p.rows;
  if (p.mask || p.labels) {
    count = 0;
    for (int64_t i = 0; i < p.rows; i++) {
      const bool counts = kd::row_counts(p, i);
      count += counts;
      STD_TORCH_CHECK(!counts || !p.labels || (p.labels[i] >= 0 && p.labels[i] < p.classes),
                      "labels must be in [0, ", p.classes, ") or ignore_index (", p.ignore_index,
                      "), got ", p.labels[i], ".");
    }
  }
  const double rows_that_count = count > 0 ? count : 1;
  if (reduction == batchmean) p.factor = 1 / rows_that_count;
  if (reduction == mean) p.factor = 1 / (rows_that_count * p.classes);

  const bool in_double =
      p.student.dtype == kd::DType::float64 || p.teacher.dtype == kd::DType::float64;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_teacher = gradient_for(teacher, grads & of_teacher, p.grad_teacher);
  const std::unique_ptr<double[]> row_loss(new double[p.rows]);
  const std::unique_ptr<double[]> row_grads(grads & of_rows ? new double[4 * p.rows] : nullptr);
  p.row_loss = row_loss.get();
  p.row_grads = row_grads.get();

  const auto& kernel = kd::kernels().rowwise;
  torch::stable::parallel_for(0, p.rows, kd::rows_per_task(p.classes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });

  const auto store = [&](const Tensor& out, const double* from, int64_t n, double factor) {
    void* data = out.mutable_data_ptr();
    for (int64_t i = 0; i < n; i++) {
      if (in_double) static_cast<double*>(data)[i] = from[i] * factor;
      else static_cast<float*>(data)[i] = static_cast<float>(from[i] * factor);
    }
  };
  Tensor rows = grads & of_rows ? contiguous({4, p.rows}, dtype) : nothing(dtype);
  if (p.row_grads) store(rows, p.row_grads, 4 * p.rows, 1);
  Tensor loss = contiguous(leading(student, reduction == none ? last : 0), dtype);
  if (reduction == none) {
    store(loss, p.row_loss, p.rows, 1);
  } else {
    double total = 0;  // in the order of the rows, whatever thread each ran on
    for (int64_t i = 0; i < p.rows; i++) total += p.row_loss[i];
    store(loss, &total, 1, p.factor);
  }
  return {loss, grad_teacher, rows};
}

kd::RowwiseParams params(int64_t kind, double alpha, double beta, double kd_weight,
                         double ce_weight, double label_smoothing, int64_t ignore_index, bool t2) {
  kd::RowwiseParams p;
  p.kind = static_cast<kd::Kind>(kind);
  p.alpha = alpha, p.beta = beta;
  p.kd_weight = kd_weight, p.ce_weight = ce_weight, p.label_smoothing = label_smoothing;
  p.ignore_index = ignore_index, p.t2 = t2;
  return p;
}

// Arguments as in the schema.
#define KD_ROWWISE_ARGUMENTS                                                                  \
  double temperature, double teacher_temperature, int64_t kind, bool t2, int64_t reduction,   \
      int64_t grads, std::optional<Tensor> labels, std::optional<Tensor> mask,                \
      std::optional<Tensor> row_weight, std::optional<Tensor> temperatures,                   \
      std::optional<Tensor> teacher_temperatures, double alpha, double beta,                  \
      double kd_weight, double ce_weight, double label_smoothing, int64_t ignore_index

std::tuple<Tensor, Tensor, Tensor, Tensor> rowwise(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  kd::RowwiseParams p = params(kind, alpha, beta, kd_weight, ce_weight, label_smoothing,
                               ignore_index, t2);
  Tensor keep;
  p.student = rows_of(student, keep);
  Tensor grad = gradient_for(student, grads & of_student, p.grad_student);
  Result r = run(p, student, teacher, labels, mask, row_weight, temperatures,
                 teacher_temperatures, temperature, teacher_temperature, reduction, grads);
  return {r.loss, grad, r.grad_teacher, r.rows};
}

std::tuple<Tensor, Tensor, Tensor> rowwise_inplace(Tensor student, Tensor teacher,
                                                   KD_ROWWISE_ARGUMENTS) {
  kd::RowwiseParams p = params(kind, alpha, beta, kd_weight, ce_weight, label_smoothing,
                               ignore_index, t2);
  STD_TORCH_CHECK(as_rows(student, p.student),
                  "kdkernels: inplace needs student logits of at most two nested row strides");
  if (grads & of_student) p.grad_student = p.student;
  Result r = run(p, student, teacher, labels, mask, row_weight, temperatures,
                 teacher_temperatures, temperature, teacher_temperature, reduction, grads);
  return {r.loss, r.grad_teacher, r.rows};
}

void scale_rows_(Tensor grad, Tensor upstream, std::optional<Tensor> row_factor) {
  const kd::RowScalar up = scalar_of(upstream, 1), factor = scalar_of(row_factor, 1);
  const auto at = [](const kd::RowScalar& s, int64_t row) {
    if (!s.data) return s.value;
    return s.is_double ? static_cast<const double*>(s.data)[row * s.stride]
                       : static_cast<const float*>(s.data)[row * s.stride];
  };
  if (!row_factor && up.stride == 0 && grad.numel() > 0 && at(up, 0) == 1) return;
  kd::Rows rows;
  STD_TORCH_CHECK(as_rows(grad, rows), "kdkernels: scale_rows_ needs at most two row strides");
  const int64_t classes = grad.size(grad.dim() - 1);
  const auto& kernel = kd::kernels().scale_row;
  torch::stable::parallel_for(
      0, classes ? grad.numel() / classes : 0, kd::rows_per_task(classes),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) kernel(rows, i, classes, at(up, i) * at(factor, i));
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rowwise", TORCH_BOX(&rowwise));
  m.impl("rowwise_inplace", TORCH_BOX(&rowwise_inplace));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}
