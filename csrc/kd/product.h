// SPDX-License-Identifier: Apache-2.0
// A matrix product as the kernels take it. For products so small, or beside work so small, that a
// library's call and its threads' start cost as much as the arithmetic.
#pragma once
#include "rows.h"

namespace kd {

// C = A B, or C += A B, each row of the product times its factor. Strides count elements.
struct Product {
  int64_t rows = 0, columns = 0, depth = 0;
  bool in_double = false;                    // type of all that is void* here: double, else float
  const void* a = nullptr;                   // (rows, depth)
  int64_t a_row = 0, a_step = 1;
  const void* b = nullptr;                   // (depth, columns), a row's elements side by side
  int64_t b_row = 0;
  void* c = nullptr;                         // (rows, columns), likewise
  int64_t c_row = 0;
  RowScalar factor;
  bool add = false;
};

constexpr int64_t product_rows = 8;  // of C, to a task

static inline int64_t tasks(const Product& p) {
  return (p.rows + product_rows - 1) / product_rows;
}

}  // namespace kd
