// SPDX-License-Identifier: Apache-2.0
// Gram matrices of embeddings in fp64, and the products that give gradients. A batch of 64 and 256
// numbers each is 0.5 M multiplications a side, for which a library's call costs as much again. A
// row's entries are sums in one order wherever it is: coincident rows have exactly equal entries.
// Included inside an ISA level's namespace.

constexpr int lanes = Lanes<vd>::count, panel = 2 * lanes, tile_rows = lanes;

KD_FN vd square_root(vd x) {
#if KD_BYTES == 64
  return (vd)_mm512_sqrt_pd((__m512d)x);
#elif KD_BYTES == 32
  return (vd)_mm256_sqrt_pd((__m256d)x);
#else
  for (int l = 0; l < lanes; l++) x[l] = __builtin_sqrt(x[l]);
  return x;
#endif
}
KD_FN vl counting() {
  vl index;
  for (int l = 0; l < lanes; l++) index[l] = l;
  return index;
}

// C (tile_rows, panel) = A B with A(r, k) at a + r a_row + k a_step, B (depth, panel) contiguous.
KD_FN void tile_product(int64_t depth, const double* a, int64_t a_row, int64_t a_step,
                        const double* b, double* c) {
  vd sums[tile_rows][2] = {};
  for (int64_t k = 0; k < depth; k++, a += a_step, b += panel) {
    const vd left = load<vd>(b), right = load<vd>(b + lanes);
    for (int r = 0; r < tile_rows; r++) {
      sums[r][0] += left * a[r * a_row];
      sums[r][1] += right * a[r * a_row];
    }
  }
  for (int r = 0; r < tile_rows; r++) {
    store(c + r * panel, sums[r][0]);
    store(c + r * panel + lanes, sums[r][1]);
  }
}

inline int columns_of(const Embeddings& x, int64_t first) {
  return x.width - first < relation_columns ? (int)(x.width - first) : (int)relation_columns;
}

// Means of a block of columns.
inline void centre(const Relation& p, const Embeddings& x, int64_t block) {
  const int64_t first = block * relation_columns;
  const int n = columns_of(x, first);
  double sums[relation_columns] = {}, scratch[relation_columns];
  for (int64_t i = 0; i < p.rows; i++) {
    const double* row = RowReader<double>{x.x, row_offset(x.x, i)}.get(first, n, scratch);
    for (int d = 0; d < n; d++) sums[d] += row[d];
  }
  for (int d = 0; d < n; d++) x.mean[first + d] = sums[d] / p.rows;
}

// `relation_rows` rows, column by column in panels.
inline void pack(const Relation& p, const Embeddings& x, int64_t group) {
  double scratch[panel][relation_columns];
  const double* rows[panel];
  for (int64_t i = group * relation_rows; i < (group + 1) * relation_rows; i += panel)
    for (int64_t first = 0; first < x.width; first += relation_columns) {
      const int n = columns_of(x, first);
      for (int r = 0; r < panel; r++) {
        rows[r] = scratch[r];
        if (i + r < p.rows)
          rows[r] = RowReader<double>{x.x, row_offset(x.x, i + r)}.get(first, n, scratch[r]);
        else __builtin_memset(scratch[r], 0, sizeof scratch[r]);
      }
      double* to = p.panels + i * x.width + first * panel;
      for (int d = 0; d < n; d++, to += panel)
        for (int r = 0; r < panel; r++) to[r] = rows[r][d];
      if (!x.mean) continue;
      to -= n * panel;
      for (int r = 0; r < panel && i + r < p.rows; r++)
        for (int d = 0; d < n; d++) to[d * panel + r] -= x.mean[first + d];
    }
}

// The rows of a group up to the diagonal, and their mirror images.
inline void gram_rows(const Relation& p, const Embeddings& x, int64_t group) {
  alignas(64) double tile[tile_rows * panel];
  const int64_t end = (group + 1) * relation_rows, size = p.padded;
  for (int64_t i = group * relation_rows; i < end; i += tile_rows) {
    const double* a = p.panels + i / panel * panel * x.width + i % panel;
    for (int64_t j = 0; j < i + tile_rows; j += panel) {
      tile_product(x.width, a, 1, panel, p.panels + j * x.width, tile);
      for (int r = 0; r < tile_rows; r++)
        for (int c = 0; c < panel && j + c <= i + r; c++)
          x.gram[(i + r) * size + j + c] = x.gram[(j + c) * size + i + r] = tile[r * panel + c];
    }
  }
}

// A block of columns of edges X.
inline void gradient(const Relation& p, const Embeddings& x, int64_t block) {
  constexpr int most = relation_columns / panel;
  const int64_t first = block * relation_columns, size = p.padded;
  const int n = columns_of(x, first), strips = (n + panel - 1) / panel;
  char* memory = (char*)__builtin_malloc(strips * size * panel * sizeof(double) + 64);
  double* strip = (double*)(memory + (64 - (uintptr_t)memory % 64));
  alignas(64) double scratch[relation_columns] = {}, mean[relation_columns] = {};
  for (int d = 0; x.mean && d < n; d++) mean[d] = x.mean[first + d];
  for (int64_t k = 0; k < size; k++) {
    const double* row = scratch;
    if (k < p.rows) row = RowReader<double>{x.x, row_offset(x.x, k)}.get(first, n, scratch);
    if (row != scratch) __builtin_memcpy(scratch, row, n * sizeof(double));
    for (int s = 0; s < strips; s++)
      for (int c = 0; c < panel; c++)
        strip[(s * size + k) * panel + c] = scratch[s * panel + c] - mean[s * panel + c];
  }
  alignas(64) double tiles[most][tile_rows * panel];
  for (int64_t j = 0; j < p.rows; j += tile_rows) {
    for (int s = 0; s < strips; s++)
      tile_product(size, x.edges + j * size, size, 1, strip + s * size * panel, tiles[s]);
    for (int r = 0; r < tile_rows && j + r < p.rows; r++) {
      for (int s = 0; s < strips; s++)
        for (int c = 0; c < panel; c++)
          scratch[s * panel + c] = x.factor * tiles[s][r * panel + c];
      RowWriter<double>(x.grad, j + r, true).flush(first, n, scratch);
    }
  }
  __builtin_free(memory);
}
