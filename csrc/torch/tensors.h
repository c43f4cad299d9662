// SPDX-License-Identifier: Apache-2.0
// Tensors as the kernels take them, and what every operator over rows of logits does around its
// kernel. LibTorch stable ABI: one binary for every torch since 2.10.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../kd/cpu/kernels.h"
#include "../kd/cpu/pages.h"

namespace kd::torch_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bits of `grads` in the schemas, and REDUCTIONS of kdkernels/divergences.py.
enum Gradients { of_student = 1, of_teacher = 2, of_rows = 4, of_parts = 8 };
enum Reduction { none, sum, batchmean, mean };

// A struct of 8-byte fields from a list of their first few; the rest keep their defaults.
template <class T, class V>
T unpack(const std::vector<V>& values) {
  static_assert(sizeof(V) == 8 && sizeof(T) % 8 == 0);
  STD_TORCH_CHECK(values.size() * 8 <= sizeof(T), "kdkernels: too many numbers for this operator");
  T out;
  std::memcpy(static_cast<void*>(&out), values.data(), values.size() * 8);
  return out;
}

inline kd::DType dtype_of(const Tensor& t) {
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
inline bool as_rows(const Tensor& t, kd::Rows& rows) {
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
inline kd::Rows rows_of(const Tensor& t, Tensor& keep) {
  kd::Rows rows;
  keep = t;
  if (!as_rows(keep, rows)) {
    keep = torch::stable::contiguous(t);
    as_rows(keep, rows);
  }
  return rows;
}

inline kd::RowScalar scalar_of(const std::optional<Tensor>& t, double value) {
  kd::RowScalar scalar;
  scalar.value = value;
  if (t) {
    scalar.data = t->const_data_ptr();
    scalar.is_double = t->scalar_type() == ScalarType::Double;
    scalar.stride = t->numel() == 1 ? 0 : 1;
  }
  return scalar;
}

// Uninitialised. Four of these are most of a small call's cost: this entry point, unlike
// `new_empty`, does not go through the dispatcher.
inline Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// In the place of an output that is not asked for.
inline Tensor nothing(ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  return empty(1, &size, &stride, dtype);
}

inline Tensor contiguous(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1) strides[d] = stride;
  return empty(shape.size(), shape.data(), strides.data(), dtype);
}

inline std::vector<int64_t> leading(const Tensor& t, int64_t dims) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < dims; d++) shape.push_back(t.size(d));
  return shape;
}

inline Tensor gradient_for(const Tensor& x, bool wanted, kd::Rows& rows, ScalarType dtype) {
  if (!wanted) return nothing(x.scalar_type());
  Tensor grad = contiguous(leading(x, x.dim()), dtype);
  as_rows(grad, rows);
  kd::advise_huge_pages(rows.data, grad.numel() * kd::size_of(rows.dtype));
  return grad;
}
inline Tensor gradient_for(const Tensor& logits, bool wanted, kd::Rows& rows) {
  return gradient_for(logits, wanted, rows, logits.scalar_type());
}

// What the operators of losses over features return gradients in: gradient_dtype of
// kdkernels/ops/features.py.
inline ScalarType gradient_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half ? ScalarType::Float : t.scalar_type();
}

// Of dense features, in memory as they are.
inline Tensor dense_gradient_for(const Tensor& t, bool wanted) {
  if (!wanted) return nothing(t.scalar_type());
  std::vector<int64_t> strides(t.dim());
  for (int64_t d = 0; d < t.dim(); d++) strides[d] = t.stride(d);
  const Tensor grad = empty(t.dim(), leading(t, t.dim()).data(), strides.data(), gradient_type(t));
  kd::advise_huge_pages(grad.mutable_data_ptr(), grad.numel() * kd::size_of(dtype_of(grad)));
  return grad;
}

// Rows, labels, mask and weights; and the reduction's factor, from how many rows count. `keep`
// holds what `p` points to.
inline void describe_rows(kd::RowLoss& p, const Tensor& student, const std::optional<Tensor>& labels,
                          const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& row_weight, int64_t reduction,
                          int64_t ignore_index, Tensor& keep) {
  p.classes = student.size(student.dim() - 1);
  p.rows = p.classes ? student.numel() / p.classes : 0;
  if (labels && labels->scalar_type() == ScalarType::Long)
    p.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  else if (labels)
    p.label_probs = rows_of(*labels, keep);
  if (mask) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  p.row_weight = scalar_of(row_weight, 1);

  int64_t count = p.rows;
  if (p.mask || p.labels) {
    count = 0;
    for (int64_t i = 0; i < p.rows; i++) {
      const bool counts = kd::row_counts(p, ignore_index, i);
      count += counts;
      STD_TORCH_CHECK(!counts || !p.labels || (p.labels[i] >= 0 && p.labels[i] < p.classes),
                      "labels must be in [0, ", p.classes, ") or ignore_index (", ignore_index,
                      "), got ", p.labels[i], ".");
    }
  }
  const double rows_that_count = count > 0 ? count : 1;
  if (reduction == batchmean) p.factor = 1 / rows_that_count;
  if (reduction == mean) p.factor = 1 / (rows_that_count * p.classes);
}

// `values` times `factor`, into a new tensor of float or double.
inline Tensor stored(const double* values, const std::vector<int64_t>& shape, ScalarType dtype,
                     double factor = 1) {
  const Tensor out = contiguous(shape, dtype);
  void* data = out.mutable_data_ptr();
  for (int64_t i = 0, n = out.numel(); i < n; i++) {
    if (dtype == ScalarType::Double) static_cast<double*>(data)[i] = values[i] * factor;
    else static_cast<float*>(data)[i] = static_cast<float>(values[i] * factor);
  }
  return out;
}

// The loss, from that of each row.
inline Tensor reduced(const kd::RowLoss& p, const Tensor& student, int64_t reduction,
                      ScalarType dtype) {
  if (reduction == none) return stored(p.row_loss, leading(student, student.dim() - 1), dtype);
  double total = 0;  // in the order of the rows, whatever thread each ran on
  for (int64_t i = 0; i < p.rows; i++) total += p.row_loss[i];
  return stored(&total, {}, dtype, p.factor);
}

}  // namespace kd::torch_binding
