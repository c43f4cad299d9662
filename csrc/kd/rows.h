// SPDX-License-Identifier: Apache-2.0
// How tensors are handed to the kernels of every family.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define KD_ANYWHERE __host__ __device__
#else
#define KD_ANYWHERE
#endif

namespace kd {

enum class DType : int { float32, float64, bfloat16, float16 };

KD_ANYWHERE constexpr int size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// N rows of C elements: row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride, so
// that slices such as logits[:, :-1] need no copy. Strides count elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0, class_stride = 1;
};

KD_ANYWHERE static inline int64_t row_offset(const Rows& rows, int64_t r) {
  return (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}

// A number per row, or one for all of them (stride 0). Null data: `value` for all.
struct RowScalar {
  const void* data = nullptr;
  bool is_double = false;
  int64_t stride = 0;
  double value = 1;
};

KD_ANYWHERE static inline double get(const RowScalar& s, int64_t row) {
  if (!s.data) return s.value;
  return s.is_double ? ((const double*)s.data)[row * s.stride]
                     : ((const float*)s.data)[row * s.stride];
}

// What every loss over rows of logits is given and fills in.
struct RowLoss {
  int64_t rows = 0, classes = 0;
  const int64_t* labels = nullptr;  // (N,); null unless the labels are class indices
  Rows label_probs;                 // null unless they are probabilities
  const uint8_t* mask = nullptr;    // (N,); 0: the row does not count
  RowScalar row_weight;
  double factor = 1;                // of the reduction, e.g. 1 / rows that count
  double* row_loss = nullptr;       // (N,) weighted, without `factor`
  double* row_grads = nullptr;      // (k, N) or null: gradients to what is one number a row
};

KD_ANYWHERE static inline bool row_counts(const RowLoss& p, int64_t ignore_index, int64_t row) {
  return (!p.mask || p.mask[row]) && (!p.labels || p.labels[row] != ignore_index);
}

}  // namespace kd
