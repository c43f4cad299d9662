// SPDX-License-Identifier: Apache-2.0
// Any loss that is a sum over the elements of two maps: value and all gradients in one pass, which
// reads both maps once and writes each gradient once (fp32: 12 bytes an element with the student's).
// What the formula's parameter costs is nothing beside that, unless it is a whole map.

template <class V>
KD_FN V counted(V v, Whole) { return v; }
template <class V>
KD_FN V counted(V v, Part part) {  // 0 beyond the row's end, where the formula need not be
  typename Lanes<V>::S lanes[Lanes<V>::count];
  write(lanes, part, v);
  return read<V>(lanes, part, typename Lanes<V>::S(0));
}

// A part of a row: n elements, with their parameters where `along`, else with one for all.
template <class S>
struct Span {
  int n;
  const S *student, *teacher, *parameter;
  S *to_student, *to_teacher, *slopes;
  bool along;
};

template <class F, class S, class V>
KD_FN V element_span(const ElementParams& p, const Span<S>& x, V total, double* slope) {
  const S margin = S(p.margin), factor = S(p.factor);
  const V one = all<V>(x.parameter ? *x.parameter : F::template absent<S>());
  V slopes = all<V>(S(0));
  sweep<V>(x.n, [&](int i, auto w) __attribute__((always_inline)) {
    const V s = read<V>(x.student + i, w, S(0)), t = read<V>(x.teacher + i, w, S(0));
    const V c = x.along ? read<V>(x.parameter + i, w, S(0)) : one;
    const Element<V> e = F::terms(s, t, c, margin);
    total += counted(e.value, w);
    if (x.to_student) write(x.to_student + i, w, e.student * factor);
    if (x.to_teacher) write(x.to_teacher + i, w, e.teacher * factor);
    if (x.slopes) write(x.slopes + i, w, e.parameter);
    else if (slope) slopes += counted(e.parameter, w);
  });
  if (slope) *slope += sum(slopes);
  return total;
}

template <class F, class S>
void element_task(const ElementParams& p, int64_t task) {
  using V = typename VectorOf<S>::V;
  const int64_t rows = element_rows(p), first = task * rows * p.length;
  const int64_t last = first + rows * p.length < p.size ? first + rows * p.length : p.size;
  const RowReader<S> student{p.student, 0}, teacher{p.teacher, 0};
  const RowWriter<S> to_student(p.grad_student, 0, false), to_teacher(p.grad_teacher, 0, false);
  alignas(64) S scratch[5][block];
  double* columns = p.column_slope ? p.column_slope + task * p.length : nullptr;
  if (columns) __builtin_memset(columns, 0, p.length * sizeof(double));
  double loss = 0;
  int64_t row = task * rows, column = 0;
  for (int64_t at = first; at < last; at += block) {
    const int n = last - at < block ? (int)(last - at) : block;
    const S *s = student.get(at, n, scratch[0]), *t = teacher.get(at, n, scratch[1]);
    S* gs = to_student.wanted() ? to_student.at(at, scratch[2]) : nullptr;
    S* gt = to_teacher.wanted() ? to_teacher.at(at, scratch[3]) : nullptr;
    V total = all<V>(S(0));
    for (int i = 0; i < n;) {
      const int part = p.length - column < n - i ? (int)(p.length - column) : n - i;
      const S* parameter = (const S*)p.parameter.data;
      if (parameter) parameter += row_offset(p.parameter, row) + column * p.parameter.class_stride;
      const Span<S> span{part, s + i, t + i, parameter, gs ? gs + i : nullptr,
                         gt ? gt + i : nullptr, columns ? scratch[4] : nullptr,
                         parameter && p.parameter.class_stride == 1};
      double* slope = p.row_slope ? p.row_slope + row : nullptr;
      if (slope && column == 0) *slope = 0;
      total = element_span<F>(p, span, total, slope);
      if (columns)
        for (int k = 0; k < part; k++) columns[column + k] += scratch[4][k];
      i += part, column += part;
      if (column == p.length) column = 0, row++;
    }
    loss += sum(total);
    if (gs) to_student.flush(at, n, gs);
    if (gt) to_teacher.flush(at, n, gt);
  }
  p.loss[task] = loss;
}
