// SPDX-License-Identifier: Apache-2.0
// What one call of the rowwise family is given, shared by the CPU and CUDA kernels.
#pragma once
#include "rows.h"

namespace kd {

// The order is that of KINDS in kdkernels/divergences.py.
enum class Kind : int64_t {
  forward_kl, reverse_kl, js, tv, skew_forward, skew_reverse, jeffreys, ab, renyi, cross_entropy,
  count
};

// Fields in the order of Numbers and Choices in kdkernels/ops/rowwise.py: the bindings copy them
// whole.
struct RowwiseNumbers {
  double temperature = 1, teacher_temperature = 0;  // the teacher's 0: the student's
  double kd_weight = 1, ce_weight = 0, label_smoothing = 0;
  double alpha = 0, beta = 0;                       // of the divergence
};
struct RowwiseChoices {
  Kind kind = Kind::forward_kl;
  int64_t t2 = 1, reduction = 0, ignore_index = -100;
};

struct RowwiseParams : RowLoss, RowwiseNumbers, RowwiseChoices {
  Rows student, teacher;
  RowScalar tau_s, tau_t;
  Rows grad_student, grad_teacher;  // null where not asked for; complete but for upstream, save
                                    // fp16: without `factor` and row weight, times half_boost
  // row_grads (4, N): to row weight, to the temperatures, and what an fp16 gradient lacks.
};

constexpr double half_boost = 256;  // HALF_BOOST in kdkernels/ops/rowwise.py

}  // namespace kd
