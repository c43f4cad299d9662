// SPDX-License-Identifier: Apache-2.0
// Matrix products by panels of columns, one task each: the order of every sum, and so its bits, is
// the same for any number of threads. B is the wide side here, a thousand classes of few samples,
// or lies transposed: a panel of it is packed into L1 once, for all rows of A. Attention's products
// (csrc/kd/cpu/attention/product.h) are of many rows with a small B. Included inside an ISA level's
// namespace.

template <class S>
struct Matrix {
  S* data;
  int64_t rows, columns, stride;
  S* row(int64_t i) const { return data + i * stride; }
};

// A tile (rows, vectors) of A B, or of A B added to C, of a packed panel of B.
template <int rows, int vectors, class S>
KD_FN void product_tile(int depth, const S* a, int64_t lda, const S* b, S* c, int64_t ldc,
                        bool add) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  V sums[rows][vectors]{};
  for (int k = 0; k < depth; k++)
    for (int v = 0; v < vectors; v++) {
      const V other = load<V>(b + k * panel + v * width);
      for (int i = 0; i < rows; i++) sums[i][v] += other * a[i * lda + k];
    }
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < vectors; v++) {
      S* const to = c + i * ldc + v * width;
      store(to, add ? load<V>(to) + sums[i][v] : sums[i][v]);
    }
}

// Six rows and two vectors are sums enough to keep a core's multipliers busy, and fit 16 registers.
template <int vectors, class S>
void product_columns(const Matrix<S>& a, int64_t k, int depth, const S* b, S* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + 6 <= a.rows; i += 6)
    product_tile<6, vectors>(depth, a.row(i) + k, a.stride, b, c + i * ldc, ldc, k > 0);
  for (; i + 2 <= a.rows; i += 2)
    product_tile<2, vectors>(depth, a.row(i) + k, a.stride, b, c + i * ldc, ldc, k > 0);
  if (i < a.rows)
    product_tile<1, vectors>(depth, a.row(i) + k, a.stride, b, c + i * ldc, ldc, k > 0);
}

// The first n <= panel columns of A B, whose b(k, j) is at b[k * row + j * column], into c, where
// there is room for a whole panel.
template <class S>
void product(const Matrix<S>& a, const S* b, int64_t row, int64_t column, int n, S* c,
             int64_t ldc) {
  constexpr int width = Lanes<typename VectorOf<S>::V>::count;
  // Rows of B, packed in L1. Their products are summed before they join the others': the rounding
  // of one long sum grows with its length.
  constexpr int most = 64;
  alignas(64) S packed[most * panel];
  if (n < panel) __builtin_memset(packed, 0, sizeof packed);
  for (int64_t first = 0; first < a.columns; first += most, b += most * row) {
    const int depth = a.columns - first < most ? (int)(a.columns - first) : most;
    if (column == 1) {
      for (int k = 0; k < depth; k++)
        __builtin_memcpy(packed + k * panel, b + k * row, n * sizeof(S));
    } else {
      for (int j = 0; j < n; j++)
        for (int k = 0; k < depth; k++) packed[k * panel + j] = b[k * row + j * column];
    }
    int j = 0;
    for (; j + width < n; j += 2 * width)
      product_columns<2>(a, first, depth, packed + j, c + j, ldc);
    if (j < n) product_columns<1>(a, first, depth, packed + j, c + j, ldc);
  }
}
