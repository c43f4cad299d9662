// SPDX-License-Identifier: Apache-2.0
// What one call of the sparse family is given, shared by the CPU and CUDA kernels.
#pragma once
#include "rowwise.h"

namespace kd {

// What the teacher's k values say of the other classes. The order is that of MISSING in
// kdkernels/divergences.py.
enum class Missing : int64_t {
  tail,        // what mass the values leave is one more class, on both sides
  zero,        // nothing is there; the student's mass there counts
  renormalize  // nor does the student's: both softmaxes are over the stored classes
};
enum class Fault : uint8_t { none, index, duplicate };

// Fields in the order of TopKNumbers and TopKChoices in kdkernels/divergences.py.
struct TopKNumbers {
  double temperature = 1, teacher_temperature = 0;  // the teacher's 0: the student's
  double beta = 0;
};
struct TopKChoices {
  Kind kind = Kind::forward_kl;
  int64_t t2 = 1, reduction = 0, ignore_index = -100;
  Missing missing = Missing::tail;
  int64_t spread = 1;  // a temperature acts on the tail as on classes of equal mass, not as on one
};

struct TopKParams : RowLoss, TopKNumbers, TopKChoices {
  int64_t k = 0;
  Rows student, values;              // (N, C); (N, k) log-probabilities or logits, -inf: absent
  const int64_t* indices = nullptr;  // (N, k)
  RowScalar tau_s, tau_t;
  RowScalar logsumexp;               // of all the teacher's values / tau_t; null data: not known
  Rows grad_student, grad_values;    // as in RowwiseParams
  Fault* faults = nullptr;           // (N,)
  // row_grads (5, N): to row weight, the temperatures and logsumexp, and what an fp16 gradient
  // lacks.
};

// The mass of a teacher's tail that rounding has lost, where reverse KL would be infinite: TRL's.
constexpr double least_tail = 1e-7;  // LEAST_TAIL in kdkernels/divergences.py

}  // namespace kd
