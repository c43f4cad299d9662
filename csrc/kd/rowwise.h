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

// Kinds and their structs in divergence.h; renyi is a function of ab's sum (alpha, 1 - alpha).
#define KD_DIVERGENCES(X)                                                                \
  X(forward_kl, ForwardKL) X(reverse_kl, ReverseKL) X(js, JS) X(tv, TV)                  \
  X(skew_forward, SkewForward) X(skew_reverse, SkewReverse) X(jeffreys, Jeffreys)        \
  X(ab, AB) X(renyi, AB) X(cross_entropy, CrossEntropy)

// What a loss does with the row's target class, in the order of TARGETS in kdkernels/divergences.py.
enum class Target : int64_t {
  ordinary,   // nothing
  decoupled,  // DKD: the divergence is over the other classes, and the target has its own
  separate,   // NKD: over the other classes, and a cross-entropy weighted by the teacher
  tempered,   // ATS: the teacher's target has a temperature of its own
  weighting,  // WSLD: the divergence is weighted by what the cross-entropies say of the row
  count
};

// Fields in the order of Numbers and Choices in kdkernels/divergences.py: the bindings copy them
// whole.
struct RowwiseNumbers {
  double temperature = 1, teacher_temperature = 0;  // the teacher's 0: the student's
  double kd_weight = 1, ce_weight = 0, label_smoothing = 0;
  double alpha = 0, beta = 0;                       // of the divergence
  double target_weight = 0, target_temperature = 0;
};
struct RowwiseChoices {
  Kind kind = Kind::forward_kl;
  int64_t t2 = 1, reduction = 0, ignore_index = -100;
  Target target = Target::ordinary;
  int64_t standardize = 0;
  int64_t first = 0, width = 0;  // the classes of the divergence; width 0: all
};

struct RowwiseParams : RowLoss, RowwiseNumbers, RowwiseChoices {
  Rows student, teacher;
  int64_t teacher_classes = 0, teacher_first = 0;  // it has all classes, or the divergence's
  const int64_t* targets = nullptr;  // (N,), where the loss looks at the target
  RowScalar tau_s, tau_t;
  Rows grad_student, grad_teacher;  // null where not asked for; complete but for upstream, save
                                    // fp16: without `factor` and row weight, times half_boost
  // row_grads (4, N): to row weight, to the temperatures, and what an fp16 gradient lacks; if
  // `parts` (6, N), then also what target and others contribute to the loss, without their weights.
  bool parts = false;
};

// Without its weight the divergence is not looked at, whatever the teacher holds.
KD_ANYWHERE static inline bool looks_at_teacher(const RowwiseParams& p) {
  return p.kd_weight != 0 || p.target_weight != 0;
}

constexpr double half_boost = 256;  // HALF_BOOST in kdkernels/ops/rowwise.py
// The same for a row of gradients up to `largest`: a smaller power of two where that may overflow.
KD_ANYWHERE static inline double half_boost_for(double largest) {
  double boost = half_boost;
  while (boost * largest > 32768 && boost > 1e-30) boost /= 2;
  return boost;
}

}  // namespace kd
