// SPDX-License-Identifier: Apache-2.0
// What one call of the relation family is given.
#pragma once
#include "rows.h"

namespace kd {

// Their fields, in order, are those of kdkernels/ops/relation.py.
struct RKDNumbers {
  double distance = 0, angle = 0;
};
struct RKDChoices {
  int64_t squared = 0;
};
struct PKTNumbers {
  double eps = 1e-7;
};
struct PolynomialNumbers {
  double coefficient[16] = {};  // by rising power
};
struct PolynomialChoices {
  int64_t norm = 0;
};
struct GramNumbers {
  double scale[2] = {1, 1};
};
struct GramChoices {
  int64_t norm = 0, distance = 0, symmetric = 0;
};
struct NSTNumbers {
  double student = 1, teacher = 1;  // 1 / channels
};

constexpr double least_square = 1e-12, near_square = 1e-13;  // CLAMP and NEAR there

// Embeddings of a batch. Everything between them and their gradients is in fp64, but for products of
// them in fp32 where `Relation::single`.
struct Embeddings {
  Rows x, grad;              // grad.data is null where it is not asked for
  int64_t width = 0;
  double factor = 1;         // of the gradient
  double* mean = nullptr;    // (width,), null: they are not centred
  void* panels = nullptr;    // (padded, width): the embeddings, packed
  double* gram = nullptr;    // (padded, padded), 0 beyond the rows
  double* edges = nullptr;   // likewise: a symmetric matrix that gives the gradient as its product
  double* inverse = nullptr; // likewise, RKD: of the distances, 0 between coincident rows
  double* row[2] = {};       // (padded,) each
};

enum class RelationStep {
  centre, pack, gram,                     // of a side
  rkd_lengths, rkd_pairs, rkd_triples, rkd_edges,
  pkt_sums, pkt_rows, pkt_edges,
  polynomial_rows, polynomial_edges,
  gradient,                               // of a side
};

struct Relation {
  int64_t rows = 0, padded = 0;
  bool single = false;
  Embeddings side[2];
  double* turns = nullptr;   // (padded, padded), RKD
  double* loss = nullptr;    // (padded,), of rows or pairs of rows
  double* slope[2] = {};     // (padded,) each
  double total[2] = {};      // what the steps before came to, by side

  RKDNumbers rkd;
  RKDChoices rkd_choices;
  PKTNumbers pkt;
  PolynomialNumbers polynomial;
};

// Tasks of the steps: of so many rows, and of so many columns.
constexpr int64_t relation_rows = 32, relation_columns = 64;
static inline int64_t relation_padded(int64_t rows) {
  return (rows + relation_rows - 1) / relation_rows * relation_rows;
}

// Gram matrices (n, R, C) of float or double, contiguous.
struct GramMatch {
  int64_t matrices = 0, rows = 0, columns = 0;
  bool in_double = false;
  GramNumbers numbers;
  GramChoices choices;
  double factor = 1;                    // of the gradients
  const void *student = nullptr, *teacher = nullptr;
  void *grad_student = nullptr, *grad_teacher = nullptr;
  double* loss = nullptr;               // (n,)
};

// S S' (n, C, C), S T' (n, C, D) and T T' (n, D, D).
struct NSTGrams {
  int64_t matrices = 0, student_channels = 0, teacher_channels = 0;
  bool in_double = false;
  NSTNumbers numbers;
  double factor = 1;
  const void *student = nullptr, *cross = nullptr, *teacher = nullptr;
  void *grad_student = nullptr, *grad_cross = nullptr, *grad_teacher = nullptr;
  double* loss = nullptr;               // (n,)
};

// Absolute differences of neighbours among rows, by blocks of columns.
constexpr int64_t neighbour_block = 1024;
struct Neighbours {
  int64_t rows = 0, width = 0;
  Rows student, teacher, grad_student, grad_teacher;
  double factor = 1;
  double* loss = nullptr;               // of every block of columns
};

}  // namespace kd
