// SPDX-License-Identifier: Apache-2.0
// What one call of the batchwise family is given.
#pragma once
#include "rows.h"

namespace kd {

// DIST. A row's probabilities are exp((z - max) / temperature) * inverse.
struct DistRow {
  double max_s = 0, max_t = 0, inverse_s = 0, inverse_t = 0;
  double mean_s = 0, mean_t = 0;  // of the exponentials
  double x = 0, y_s = 0, y_t = 0; // d loss / d p_s = x (p_t - mean) - y_s (p_s - mean)
  double loss = 0;                // its share of the inter-class term
  double slope = 0;               // sum dz z, for the temperature
};

// Moments of a block of rows, then coefficients of all, per class.
enum DistMoment { mean_s, mean_t, sum_s, sum_t, sum_ss, sum_tt, sum_st, dist_moments };
enum DistColumn { centre_s, centre_t, column_x, column_y_s, column_y_t, dist_coefficients };

// Their fields, in order, are those of DistNumbers and DistChoices in kdkernels/ops/batchwise.py.
struct DistNumbers {
  double temperature = 1, beta = 1, gamma = 1;
};
struct DistChoices {
  int64_t t2 = 1, clamp = 0;        // clamp: the norms, where else eps is added to their product
};

struct DistParams : DistNumbers, DistChoices {
  int64_t rows = 0, classes = 0, counted = 0;  // counted: the rows that take part
  Rows student, teacher;
  const uint8_t* mask = nullptr;    // (N,); 0: the row takes no part

  DistRow* row = nullptr;           // (N,)
  double* moments = nullptr;        // (blocks, dist_moments, C)
  void* columns = nullptr;          // (dist_coefficients, C) of the type accumulated in
  double* column_loss = nullptr;    // (C,)
  Rows grad_student, grad_teacher;  // null where not asked for
  double* row_factor = nullptr;     // (2, N) or null: what fp16 gradients lack
  bool temperature_grad = false;    // whether DistRow::slope is wanted
};

constexpr double dist_eps = 1e-8;

// Rows whose column moments one task accumulates; the partition depends on the shape alone, so that
// sums are the same for any number of threads. At 32 rows, moments are a fifth of the logits' bytes.
static inline int64_t dist_block_rows(int64_t rows, int64_t classes) {
  constexpr int64_t least = 32, elements = 16384, most_blocks = 64;
  int64_t n = elements / (classes > 0 ? classes : 1);
  n = n > least ? n : least;
  const int64_t even = (rows + most_blocks - 1) / most_blocks;
  return n > even ? n : even;
}
static inline int64_t dist_blocks(int64_t rows, int64_t classes) {
  const int64_t n = dist_block_rows(rows, classes);
  return (rows + n - 1) / n;
}

constexpr int most_temperatures = 16;  // MOST_TEMPERATURES in kdkernels/ops/batchwise.py

// MLKD: what its Gram matrices are made of, and what becomes of them. Tensors without a dtype have
// that which is accumulated in: fp32, or fp64 if either side is.
struct MlkdParams {
  int64_t rows = 0, classes = 0, temperatures = 0;
  const double* temperature = nullptr;  // (T,)
  const uint8_t* mask = nullptr;        // (N,); 0: the row takes no part
  bool in_double = false;

  Rows student, teacher;
  void* soft = nullptr;                 // (T, 2, N, C): p_s, and p_s - p_t without cancellation
  void* kl = nullptr;                   // (N,): sum of T^2 KL(p_t || p_s)

  const void* relations = nullptr;      // (T, N, C): d loss / d p of one side, less its KL's
  const void* row_weight = nullptr;     // (N,): of kl in the loss
  bool of_teacher = false;
  Rows grad;
  double* row_factor = nullptr;         // (N,) or null: what an fp16 gradient lacks
};

// MLKD: from the Gram matrices (T, N, N) of P and D = P - Q, P D', D D' and P P', to the loss of the
// relations and to the matrices that give their gradients as products with P and D.
struct MlkdGrams {
  int64_t matrices = 0, size = 0;
  bool in_double = false;
  double near_weight = 0, far_weight = 0;
  const void *pd = nullptr, *dd = nullptr, *pp = nullptr;
  // Where only some rows and columns are selected: those of all columns, and (N,) 0 or 1; the
  // others are of the selected columns then.
  const void *near_pd = nullptr, *near_dd = nullptr, *chosen = nullptr;

  double* loss = nullptr;                              // (T, N)
  void *student = nullptr, *teacher = nullptr;         // (2, T, N, N): of P, of D; or null
  void* near = nullptr;                                // (T, N, N), null where all is selected
};

// MLKD: the relations of a small batch and their gradients, from mlkd_softmax's result.
struct MlkdRelations {
  int64_t rows = 0, classes = 0, temperatures = 0;
  bool in_double = false;
  const void* soft = nullptr;                          // (T, 2, N, C)
  const void *samples = nullptr, *columns = nullptr;   // (N,), (C,) 0 or 1; null: all
  double row_weight = 0, column_weight = 0;
  double* loss = nullptr;                              // (T,)
  void *grad_student = nullptr, *grad_teacher = nullptr;  // (T, N, C) or null
};

}  // namespace kd
