// SPDX-License-Identifier: Apache-2.0
// Samples attend to samples: what is done to rows between the products, shared by the backends.
//
// With s the softened logits, 0 where a class takes no part, Q = s Wq, K = s Wk, V = s Wv and, per
// head, P = softmax(Q K' / sqrt(d)), the result is teacher + temperature O Wo, O being the heads'
// P V side by side.
#pragma once
#include "rows.h"

namespace kd {

// The steps of a call, each a row at a time, in any order.
//   soften    s; and out, before the product is added: the logits, 0 without a residual
//   softmax   of the scores, in their place
//   arrive    the gradient of out times the temperature, 0 where a class takes no part
//   score     the gradient of P to that of the scores, in its place
//   teacher   the gradient of s to those of the logits and of the temperature
enum class RowStep { soften, softmax, arrive, score, teacher };

struct RowAttention {
  int64_t rows = 0, classes = 0;
  int64_t others = 0;               // rows that are attended to
  bool in_double = false;           // type of all that is void* here: double, else float
  Rows teacher;                     // (N, K); -inf: the class takes no part
  RowScalar temperature;
  bool residual = true;

  void* soft = nullptr;             // (N, K)
  void* out = nullptr;              // (N, K)
  void* scores = nullptr;           // (H N, others): scores, then P

  const void* upstream = nullptr;   // (N, K), the gradient of out
  void* arriving = nullptr;         // (N, K)
  void* to_scores = nullptr;        // (H N, others)
  const void* to_soft = nullptr;    // (N, K)
  const void* attended = nullptr;   // O and its gradient, (N, width)
  const void* to_attended = nullptr;
  int64_t width = 0;
  Rows grad_teacher;                // null where not asked for
  double* grad_temperature = nullptr;  // (N,) or null
};

}  // namespace kd
