// SPDX-License-Identifier: Apache-2.0
// Matrix products in tiles of registers: per step of the depth two vectors of B are loaded and each
// multiplied by an element of several rows of A. Tasks are of rows, of which there may be many, and
// read B, tokens or weights that caches hold, where it lies: packed panels of columns, as of
// csrc/kd/cpu/batchwise/product.h, would be two or three tasks. Included inside an ISA level's
// namespace.

// Rows of a tile: with their sums, two vectors of B fit into the registers.
constexpr int tile_rows = KD_BYTES == 64 ? 8 : 4;

template <class S, class W>
KD_FN void product_tile(const Product& p, int64_t row, int64_t column, W left, W right) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  const S* a[tile_rows];
  for (int r = 0; r < tile_rows; r++)  // past the end, the last row again
    a[r] = (const S*)p.a + (row + r < p.rows ? row + r : p.rows - 1) * p.a_row;
  const S* b = (const S*)p.b + column;
  V sums[tile_rows][2]{};
  for (int64_t k = 0, at = 0; k < p.depth; k++, at += p.a_step, b += p.b_row) {
    const V x = read<V>(b, left, S(0)), y = read<V>(b + width, right, S(0));
    for (int r = 0; r < tile_rows; r++) {
      const S element = a[r][at];
      sums[r][0] += x * element, sums[r][1] += y * element;
    }
  }
  for (int r = 0; r < tile_rows && row + r < p.rows; r++) {
    const S factor = (S)get(p.factor, row + r);
    S* c = (S*)p.c + (row + r) * p.c_row + column;
    V x = sums[r][0] * factor, y = sums[r][1] * factor;
    if (p.add) x += read<V>(c, left, S(0)), y += read<V>(c + width, right, S(0));
    write(c, left, x), write(c + width, right, y);
  }
}

template <class S>
void product_task(const Product& p, int64_t task) {
  constexpr int width = Lanes<typename VectorOf<S>::V>::count;
  const int64_t first = task * product_rows;
  for (int64_t row = first; row < first + product_rows && row < p.rows; row += tile_rows) {
    int64_t column = 0;
    for (; column + 2 * width <= p.columns; column += 2 * width)
      product_tile<S>(p, row, column, Whole{}, Whole{});
    const int rest = (int)(p.columns - column), left = rest < width ? rest : width;
    if (rest) product_tile<S>(p, row, column, Part{left}, Part{rest - left});
  }
}

void product(const Product& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; task++) {
    if (p.in_double) product_task<double>(p, task);
    else product_task<float>(p, task);
  }
}
