// SPDX-License-Identifier: Apache-2.0
// What one call of the rowwise family is given, shared by the CPU and CUDA kernels.
#pragma once
#include <stdint.h>

namespace kd {

// The order is that of KINDS in kdkernels/ops/rowwise.py.
enum class Kind : int {
  forward_kl, reverse_kl, js, tv, skew_forward, skew_reverse, jeffreys, ab, renyi, cross_entropy,
  count
};

enum class DType : int { float32, float64, bfloat16, float16 };

constexpr int size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// N rows of C elements: row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride, so
// that slices such as logits[:, :-1] need no copy. Strides count elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0, class_stride = 1;
};

// A number per row, or one for all of them (stride 0). Null data: `value` for all.
struct RowScalar {
  const void* data = nullptr;
  bool is_double = false;
  int64_t stride = 0;
  double value = 1;
};

struct RowwiseParams {
  int64_t rows = 0, classes = 0;
  Rows student, teacher;
  Rows label_probs;                  // null unless the labels are probabilities
  const int64_t* labels = nullptr;   // (N,); null unless the labels are class indices
  const uint8_t* mask = nullptr;     // (N,); 0: the row does not count
  RowScalar row_weight, temperature, teacher_temperature;
  Kind kind = Kind::forward_kl;
  double alpha = 0, beta = 0;
  double kd_weight = 1, ce_weight = 0, label_smoothing = 0;
  int64_t ignore_index = -100;
  bool t2 = true;
  double factor = 1;                 // of the reduction, e.g. 1 / rows that count

  double* row_loss = nullptr;        // (N,) weighted, without `factor`
  Rows grad_student, grad_teacher;   // null where not asked for; complete but for upstream, save
                                     // fp16: without `factor` and row weight, times half_boost
  double* row_grads = nullptr;       // (4, N) or null: to row weight, to the temperatures, and
                                     // what an fp16 gradient lacks
};

constexpr double half_boost = 256;   // HALF_BOOST in kdkernels/ops/rowwise.py

static inline bool row_counts(const RowwiseParams& p, int64_t row) {
  return (!p.mask || p.mask[row]) && (!p.labels || p.labels[row] != p.ignore_index);
}

}  // namespace kd
