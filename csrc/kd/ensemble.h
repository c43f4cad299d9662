// SPDX-License-Identifier: Apache-2.0
// What one call of the ensemble family is given, shared by the CPU and CUDA kernels.
#pragma once
#include "rowwise.h"

namespace kd {

struct EnsembleTeacher {
  Rows logits, grad;  // grad: null data where not asked for
  RowScalar weight;
};

// As rowwise's forward KL, with M teachers in the place of its one.
struct EnsembleParams : RowwiseParams {
  const EnsembleTeacher* teachers = nullptr;
  int64_t count = 0;            // M
  bool mixture = false;         // of probabilities; else the sum of the divergences
  bool weight_grads = false;    // teachers without weight are looked at too
  // row_grads (4 + M, N): as rowwise's, then to the weights.
};

}  // namespace kd
