// SPDX-License-Identifier: Apache-2.0
// CC as published with RepDistiller: the differences of consecutive rows multiplied. Both sides are
// read once and every gradient written once; three rows of a block of columns wait in L1.
// Included inside an ISA level's namespace.

static_assert(neighbour_block == block, "");

inline void neighbours(const Neighbours& p, int64_t b) {
  const int64_t first = b * block;
  const int n = p.width - first < block ? (int)(p.width - first) : block;
  alignas(64) double difference[3][block + 8] = {}, scratch[2][block], slope[block];
  const auto read_row = [&](int64_t i) {
    const double* s = RowReader<double>{p.student, row_offset(p.student, i)}.get(first, n, scratch[0]);
    const double* t = RowReader<double>{p.teacher, row_offset(p.teacher, i)}.get(first, n, scratch[1]);
    for (int k = 0; k < n; k++) difference[i % 3][k] = s[k] - t[k];
  };
  const auto size = [](double x) { return x < 0 ? -x : x; };
  double loss = 0;
  if (p.rows > 0) read_row(0);
  for (int64_t i = 0; i < p.rows; i++) {
    const double *before = difference[(i + 2) % 3], *own = difference[i % 3];
    double* after = difference[(i + 1) % 3];
    if (i + 1 < p.rows) read_row(i + 1);
    else __builtin_memset(after, 0, sizeof difference[0]);
    for (int k = 0; k < n; k++) {
      loss += size(own[k]) * size(after[k]);
      const double around = size(before[k]) + size(after[k]);
      slope[k] = own[k] > 0 ? around : own[k] < 0 ? -around : own[k] * around;  // NaN stays
    }
    const auto put = [&](const Rows& grad, double factor, double* out) {
      if (!grad.data) return;
      for (int k = 0; k < n; k++) out[k] = slope[k] * factor;
      RowWriter<double>(grad, i, true).flush(first, n, out);
    };
    put(p.grad_student, p.factor, scratch[0]);
    put(p.grad_teacher, -p.factor, scratch[0]);
  }
  p.loss[b] = loss;
}
