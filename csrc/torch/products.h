// SPDX-License-Identifier: Apache-2.0
// Matrices in the scratch space and the arguments of an operator, and their products.
#pragma once
#include "tensors.h"

namespace kd::torch_binding {

// Of floats or doubles, seen through any strides; `keep` holds the memory.
struct Matrix {
  Tensor keep;
  char* data;
  int64_t rows, columns, row, step;
  int64_t size;  // of an element

  Matrix(const Tensor& t, int64_t rows, int64_t columns)
      : keep(torch::stable::contiguous(t)),
        data(static_cast<char*>(const_cast<void*>(keep.const_data_ptr()))),
        rows(rows), columns(columns), row(columns), step(1),
        size(t.scalar_type() == ScalarType::Double ? 8 : 4) {}
  explicit Matrix(const Tensor& t) : Matrix(t, t.size(0), t.size(1)) {}
  Matrix(int64_t rows, int64_t columns, ScalarType dtype)
      : Matrix(contiguous({rows, columns}, dtype), rows, columns) {}

  char* at(int64_t i, int64_t j) const { return data + (i * row + j * step) * size; }
  Matrix block(int64_t i, int64_t n, int64_t j, int64_t m) const {
    Matrix part = *this;
    part.data = at(i, j), part.rows = n, part.columns = m;
    return part;
  }
  Matrix first_rows(int64_t n) const { return block(0, n, 0, columns); }
  // The columns of one of `heads`.
  Matrix head(int64_t which, int64_t heads) const {
    return block(0, rows, which * (columns / heads), columns / heads);
  }
  // One of `n` matrices that lie one below the other.
  Matrix slab(int64_t which, int64_t n) const {
    return block(which * (rows / n), rows / n, 0, columns);
  }
  Matrix transposed() const {
    Matrix other = *this;
    std::swap(other.rows, other.columns), std::swap(other.row, other.step);
    return other;
  }
};

template <class S>
void copy(const Matrix& from, const Matrix& to) {
  for (int64_t i = 0; i < from.rows; i++)
    for (int64_t j = 0; j < from.columns; j++)
      *(S*)to.at(i, j) = *(const S*)from.at(i, j);
}
inline void copy(const Matrix& from, const Matrix& to) {
  from.size == 8 ? copy<double>(from, to) : copy<float>(from, to);
}

template <class Kernel>
void run_tasks(int64_t n, int64_t work, const Kernel& kernel) {
  torch::stable::parallel_for(0, n, work >= kd::grain ? 1 : n, kernel);
}

inline kd::RowScalar number(double value) {
  kd::RowScalar scalar;
  scalar.value = value;
  return scalar;
}

// c = factor a b, or added to c.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& c,
                     const kd::RowScalar& factor = {}, bool add = false) {
  if (b.step != 1 && b.columns > 1) {
    Matrix dense(b.rows, b.columns, b.keep.scalar_type());
    copy(b, dense);
    return multiply(a, dense, c, factor, add);
  }
  kd::Product p;
  p.rows = a.rows, p.columns = b.columns, p.depth = a.columns;
  p.in_double = a.size == 8;
  p.a = a.data, p.a_row = a.row, p.a_step = a.step;
  p.b = b.data, p.b_row = b.row;
  p.c = c.data, p.c_row = c.row;
  p.factor = factor, p.add = add;
  // `grain` is of elements, each of which is worth some ten multiplications.
  run_tasks(kd::tasks(p), p.rows * p.columns * p.depth / 10, [&](int64_t begin, int64_t end) {
    kd::kernels().product(p, begin, end);
  });
}

}  // namespace kd::torch_binding
