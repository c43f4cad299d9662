// SPDX-License-Identifier: Apache-2.0
// What both losses need of a row's softmax. Included inside an ISA level's namespace.

template <class S>
S largest_of(const RowReader<S>& row, int64_t classes) {
  using V = typename VectorOf<S>::V;
  alignas(64) S buffer[block];
  V high = all<V>(floor_of<S>);
  for_blocks(classes, [&](int64_t first, int n) {
    const S* z = row.get(first, n, buffer);
    sweep<V>(n, [&](int i, auto w) { high = at_least(read<V>(z + i, w, floor_of<S>), high); });
  });
  return largest(high);
}

// A power of two that brings numbers up to `bound` to where fp16 holds them best.
inline double half_scale(double bound) {
  double scale = 1;
  while (bound * scale > 32768 && scale > 1e-30) scale /= 2;
  while (bound > 0 && bound * scale < 16384 && scale < 1e30) scale *= 2;
  return scale;
}
