// SPDX-License-Identifier: Apache-2.0
// What one call of the attention family is given, shared by the CPU and CUDA kernels.
//
// Classes attend to classes. With s the softened logits of a sample (teacher / temperature), class i
// looks at class j with the score
//   score_ij = a s_i s_j + b_j s_i + c_i s_j + E_ij
// and receives o_i = sum_j softmax_j(score_ij) (u s_j + v_j), summed over heads. The coefficients
// are a matrix per head, in which the logit comes after the K classes: E = scores[:K, :K],
// b = scores[K, :K], c = scores[:K, K], a = scores[K, K]; v = values[:K], u = values[K].
#pragma once
#include "rows.h"

namespace kd {

// The steps of a call, each a number of tasks that need no order.
enum class AttentionStep { soften, forward, backward, collect, teacher };

struct ClassAttention {
  int64_t rows = 0, classes = 0, heads = 0;
  bool in_double = false;          // type of all that is void* here: double, else float
  Rows teacher;                    // (N, K); -inf: the class takes no part
  RowScalar temperature;
  bool residual = true;            // out = teacher + temperature o, else temperature o
  const void* scores = nullptr;    // (H, K + 1, K + 1)
  const void* values = nullptr;    // (H, K + 1)

  void* soft = nullptr;            // (N, padded(K)), scratch: s
  uint8_t* some_off = nullptr;     // (N,), scratch: whether a class takes no part

  void* out = nullptr;             // (N, K)
  void* stats = nullptr;           // (4, H, N, K) or null: shift and sum of the exponentials, and
                                   // the softmax's means of s and of v

  const void* upstream = nullptr;  // (N, K), the gradient of `out`
  void* partial = nullptr;         // (row_blocks(K), 2, H, K + 1), scratch
  void* grad_scores = nullptr;     // (H, K + 1, K + 1)
  void* grad_values = nullptr;     // (H, K + 1)
  Rows grad_teacher;               // null where not asked for
  double* grad_temperature = nullptr;  // (N,) or null
};

// A task of the kernels takes this many rows of the score matrix, through all samples.
constexpr int64_t score_rows = 4;

static inline int64_t row_blocks(int64_t classes) {
  return (classes + score_rows - 1) / score_rows;
}
// Whole vectors at every ISA level.
static inline int64_t padded(int64_t classes) { return (classes + 15) / 16 * 16; }

static inline int64_t tasks(const ClassAttention& p, AttentionStep step) {
  switch (step) {
    case AttentionStep::forward:
    case AttentionStep::backward: return row_blocks(p.classes);
    case AttentionStep::collect: return 2 * p.heads;
    default: return p.rows;
  }
}

}  // namespace kd
