// SPDX-License-Identifier: Apache-2.0
// kdkernels::scale_rows_ on CPU tensors. The schema is defined in kdkernels/ops/autograd.py.
#include "tensors.h"

namespace {

using namespace kd::torch_binding;

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

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("scale_rows_", TORCH_BOX(&scale_rows_)); }
