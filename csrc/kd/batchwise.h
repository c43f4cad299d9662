// SPDX-License-Identifier: Apache-2.0
// What one call of the batchwise family is given.
#pragma once
#include "rows.h"

namespace kd {

// DIST. A row's probabilities are exp((z - max) / temperature) * inverse.
struct DistRow {
  double max_s = 0, max_t = 0, inverse_s = 0, inverse_t = 0;
  double mean_s = 0, mean_t = 0;  // of the probabilities
  double x = 0, y_s = 0, y_t = 0; // d loss / d p_s = x (p_t - mean) - y_s (p_s - mean)
  double loss = 0;                // its share of the inter-class term
  double slope = 0;               // sum dz z, for the temperature
};

// Moments of a tile of rows, then coefficients of all, per class.
enum DistMoment { mean_s, mean_t, sum_ss, sum_tt, sum_st, pivot_s, pivot_t, dist_moments };
constexpr int dist_sums = pivot_s;  // of these, the sums; what the columns are measured from
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
  // Of the type accumulated in, rows dist_stride apart.
  void* soft = nullptr;             // (2, N, C) the probabilities, or null: computed again
  void* moments = nullptr;          // (tiles, dist_moments, C)
  void* columns = nullptr;          // (dist_coefficients, C)
  double* column_loss = nullptr;    // of each task's columns
  Rows grad_student, grad_teacher;  // null where not asked for
  double* row_factor = nullptr;     // (2, N) or null: what fp16 gradients lack
  bool temperature_grad = false;    // whether DistRow::slope is wanted
};

constexpr double dist_eps = 1e-8;

// Logits of a side up to which the probabilities are kept: a few megabytes, which caches hold.
constexpr int64_t dist_kept = 1 << 20;

// Rows whose column moments are summed before they join the others': their memory is a ninth of the
// probabilities'.
constexpr int64_t dist_tile = 32;
static inline int64_t dist_tiles(int64_t rows) { return (rows + dist_tile - 1) / dist_tile; }

// Rows of one task, whole tiles, and columns of one; partitions depend on the shape alone, so that
// sums are the same for any number of threads.
constexpr int64_t dist_tasks = 64;  // of a step, at most
static inline int64_t dist_block_rows(int64_t rows, int64_t classes) {
  constexpr int64_t elements = 16384;
  const int64_t worth = elements / (classes > 0 ? classes : 1);
  const int64_t even = (rows + dist_tasks - 1) / dist_tasks, n = worth > even ? worth : even;
  return n > dist_tile ? dist_tiles(n) * dist_tile : dist_tile;
}
static inline int64_t dist_blocks(int64_t rows, int64_t classes) {
  const int64_t n = dist_block_rows(rows, classes);
  return (rows + n - 1) / n;
}
static inline int64_t dist_task_columns(int64_t classes) {
  constexpr int64_t least = 128 * dist_tasks;
  return (classes + least - 1) / least * 128;
}
static inline int64_t dist_column_tasks(int64_t classes) {
  const int64_t n = dist_task_columns(classes);
  return n ? (classes + n - 1) / n : 0;
}

static inline bool in_double(const DistParams& p) {
  return p.student.dtype == DType::float64 || p.teacher.dtype == DType::float64;
}

// Numbers from one row to the next of what stands between the steps. Rows begin on cache lines, as
// a vector across two of them costs two reads; and not at nearly the same place of a page, where a
// read waits for writes to its neighbours.
static inline int64_t dist_stride(const DistParams& p) {
  const int64_t line = in_double(p) ? 8 : 16, page = 64 * line, apart = 4 * line;
  const int64_t n = (p.classes + line - 1) / line * line, rest = n % page;
  return n + (rest < apart ? apart - rest : rest > page - apart ? page + apart - rest : 0);
}

// The memory of that, in doubles, and its parts.
static inline int64_t dist_scratch(const DistParams& p) {
  const int64_t rows = dist_coefficients + dist_tiles(p.rows) * dist_moments +
                       (p.rows * p.classes <= dist_kept ? 2 * p.rows : 0);
  return dist_tasks + dist_stride(p) * (in_double(p) ? rows : (rows + 1) / 2) + 8;
}
static inline void dist_place(DistParams& p, double* memory) {
  const int64_t row = dist_stride(p) * (in_double(p) ? 8 : 4);
  char* const first = (char*)(((uintptr_t)memory + 63) / 64 * 64);
  p.column_loss = (double*)first;
  p.columns = first + dist_tasks * 8;
  p.moments = (char*)p.columns + dist_coefficients * row;
  if (p.rows * p.classes <= dist_kept)
    p.soft = (char*)p.moments + dist_tiles(p.rows) * dist_moments * row;
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

// MLKD: the relations and their gradients to the probabilities, from mlkd_softmax's result.
struct MlkdRelations {
  int64_t rows = 0, classes = 0, temperatures = 0;
  bool in_double = false;
  const void* soft = nullptr;                          // (T, 2, N, C)
  const void *samples = nullptr, *columns = nullptr;   // (N,), (C,) 0 or 1; null: all
  double row_weight = 0, column_weight = 0;
  void *grad_student = nullptr, *grad_teacher = nullptr;  // (T, N, C) or null

  // Filled in by Relations (csrc/kd/cpu/relations.h); see relate.h for near and far.
  int64_t size = 0, depth = 0;                         // the smaller of N and C, and the other
  double near_weight = 0, far_weight = 0;
  const int64_t *near = nullptr, *far = nullptr;       // indices of what is selected, where not all
  int64_t n_near = 0, n_far = 0;
  bool selected = false, gathered = false, of_teacher = false;
  int64_t temperature = 0;
  void *memory = nullptr, *grad = nullptr;
  double* row_loss = nullptr;                          // (n_near + size,)
};

enum class RelateStep {
  gather, near_gram, far_gram, far_square, slopes, far_gradient, gradient
};

constexpr int panel = 32;  // columns of a matrix product that one task computes

// Columns of a matrix with room for whole panels, and no multiple of a page: its rows would compete
// for a few sets of the cache.
static inline int64_t relation_stride(int64_t columns) {
  const int64_t whole = (columns + panel - 1) / panel * panel;
  return whole % 1024 ? whole : whole + panel;
}
// Numbers at `memory`.
static inline int64_t relation_numbers(const MlkdRelations& p) {
  const int64_t near = p.n_near, n = p.n_far ? p.size : 0;
  return 2 * near * (relation_stride(near) + relation_stride(p.depth)) +
         near * relation_stride(2 * near) + 3 * n * relation_stride(n) +
         n * relation_stride(2 * n) + (p.selected ? n : 0) * relation_stride(p.n_far) +
         (p.gathered ? 2 * n : 0) * relation_stride(p.n_far);
}

}  // namespace kd
