// SPDX-License-Identifier: Apache-2.0
// Losses over feature maps: what their kernels are given and fill in.
#pragma once
#include <stdint.h>

#include "rows.h"

namespace kd {

// Sums over elements; the formulas are in elementwise.h. As KINDS in kdkernels/ops/maps/
// elementwise.py.
enum class ElementKind : int64_t { square, ofd, ab, count };

struct ElementNumbers {
  double margin = 1;
};
struct ElementChoices {
  ElementKind kind = ElementKind::square;
};

// Maps that are dense in one order are rows of `length` elements, the last one perhaps short: the
// spatial part of a channel where that is innermost, the channels of a pixel where these are. What
// the formula's parameter is, a number a channel or a mask, is then a number a row or rows of its
// own, of class_stride 0 or 1.
struct ElementParams : ElementNumbers, ElementChoices {
  int64_t size = 0, length = 1;
  Rows student, teacher;            // all their elements as one row
  Rows parameter;                   // of the type accumulated in, or null
  Rows grad_student, grad_teacher;  // null where not asked for
  double student_factor = 1, teacher_factor = 1;  // of the gradients
  double* loss = nullptr;           // (tasks,), without a factor
  // The gradient to the parameter, or null: (rows,), or where it differs along a row (tasks, length).
  double *row_slope = nullptr, *column_slope = nullptr;
};

// Elements are split by whole rows; the partition depends on the shape alone, so that sums are the
// same for any number of threads.
static inline int64_t element_rows(const ElementParams& p) {
  constexpr int64_t elements = 16384;
  return p.length < elements ? elements / p.length : 1;
}
static inline int64_t element_tasks(const ElementParams& p) {
  const int64_t each = element_rows(p) * p.length;
  return (p.size + each - 1) / each;
}

}  // namespace kd
