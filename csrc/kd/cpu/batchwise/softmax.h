// SPDX-License-Identifier: Apache-2.0
// What both losses need of a row's softmax. Included inside an ISA level's namespace.

// Four maxima take turns, since each of them waits for its last comparison.
template <class S>
S largest_of(const RowReader<S>& row, int64_t classes) {
  using V = typename VectorOf<S>::V;
  constexpr int turns = 4, step = turns * Lanes<V>::count;
  alignas(64) S buffer[block];
  V high[turns];
  for (V& h : high) h = all<V>(floor_of<S>);
  for_blocks(classes, [&](int64_t first, int n) {
    const S* z = row.get(first, n, buffer);
    int i = 0;
    for (; i + step <= n; i += step)
      for (int j = 0; j < turns; j++)
        high[j] = at_least(load<V>(z + i + j * Lanes<V>::count), high[j]);
    sweep<V>(n - i, [&](int k, auto w) {
      high[0] = at_least(read<V>(z + i + k, w, floor_of<S>), high[0]);
    });
  });
  return largest(at_least(at_least(high[0], high[1]), at_least(high[2], high[3])));
}

// A power of two that brings numbers up to `bound` to where fp16 holds them best.
inline double half_scale(double bound) {
  double scale = 1;
  while (bound * scale > 32768 && scale > 1e-30) scale /= 2;
  while (bound > 0 && bound * scale < 16384 && scale < 1e30) scale *= 2;
  return scale;
}
