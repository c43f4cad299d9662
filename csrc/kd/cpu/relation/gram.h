// SPDX-License-Identifier: Apache-2.0
// Gram matrices of embeddings, and the products that give gradients: in fp64, or in fp32 where no
// distances are made of them. A batch of 64 and 256 numbers each is 0.5 M multiplications a side, for
// which a library's call costs as much again. A row's entries are sums in one order wherever it is:
// coincident rows have exactly equal entries.
//
// Neither of the other small products (csrc/kd/cpu/attention/product.h, batchwise/product.h) serves:
// here both factors are one matrix, packed once for all tasks, of any dtype and strides, and centred
// on the way; half of the tiles are computed, and stored twice.
// Included inside an ISA level's namespace.

constexpr int lanes = Lanes<vd>::count;

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

constexpr int tile_rows = KD_BYTES / 8;
template <class S>
constexpr int panel = 2 * Lanes<typename VectorOf<S>::V>::count;

// C (tile_rows, panel) = A B with A(r, k) at a + r a_row + k a_step, B (depth, panel) contiguous.
template <class S>
KD_FN void tile_product(int64_t depth, const S* a, int64_t a_row, int64_t a_step, const S* b, S* c) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  V sums[tile_rows][2] = {};
  for (int64_t k = 0; k < depth; k++, a += a_step, b += panel<S>) {
    const V left = load<V>(b), right = load<V>(b + width);
    for (int r = 0; r < tile_rows; r++) {
      sums[r][0] += left * a[r * a_row];
      sums[r][1] += right * a[r * a_row];
    }
  }
  for (int r = 0; r < tile_rows; r++) {
    store(c + r * panel<S>, sums[r][0]);
    store(c + r * panel<S> + width, sums[r][1]);
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

// Of as many vectors as they have lanes: each round interleaves the first half with the second.
template <class V>
KD_FN void transpose(V (&rows)[Lanes<V>::count]) {
  constexpr int n = Lanes<V>::count;
  typename Lanes<V>::I low, high;
  for (int l = 0; l < n; l++) low[l] = l / 2 + l % 2 * n, high[l] = low[l] + n / 2;
  for (int round = 1; round < n; round *= 2) {
    V mixed[n];
    for (int i = 0; i < n / 2; i++) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
    for (int i = 0; i < n; i++) rows[i] = mixed[i];
  }
}

// `relation_rows` rows, column by column in panels.
template <class S>
void pack(const Relation& p, const Embeddings& x, int64_t group) {
  using V = typename VectorOf<S>::V;
  constexpr int wide = panel<S>, square = Lanes<V>::count;
  S scratch[wide][relation_columns];
  const S* rows[wide];
  for (int64_t i = group * relation_rows; i < (group + 1) * relation_rows; i += wide)
    for (int64_t first = 0; first < x.width; first += relation_columns) {
      const int n = columns_of(x, first);
      for (int r = 0; r < wide; r++) {
        rows[r] = scratch[r];
        if (i + r < p.rows)
          rows[r] = RowReader<S>{x.x, row_offset(x.x, i + r)}.get(first, n, scratch[r]);
        else __builtin_memset(scratch[r], 0, sizeof scratch[r]);
      }
      S* to = (S*)x.panels + i * x.width + first * wide;
      int d = 0;
      for (; d + square <= n; d += square)
        for (int half = 0; half < wide; half += square) {
          V tile[square];
          for (int r = 0; r < square; r++) tile[r] = load<V>(rows[half + r] + d);
          transpose(tile);
          for (int c = 0; c < square; c++) store(to + (d + c) * wide + half, tile[c]);
        }
      for (; d < n; d++)
        for (int r = 0; r < wide; r++) to[d * wide + r] = rows[r][d];
      if (!x.mean) continue;
      for (int r = 0; r < wide && i + r < p.rows; r++)
        for (int d = 0; d < n; d++) to[d * wide + r] -= S(x.mean[first + d]);
    }
}

// The rows of a group up to the diagonal, and their mirror images.
template <class S>
void gram_rows(const Relation& p, const Embeddings& x, int64_t group) {
  constexpr int wide = panel<S>;
  alignas(64) S tile[tile_rows * wide];
  const S* const panels = (const S*)x.panels;
  const int64_t end = (group + 1) * relation_rows, size = p.padded;
  for (int64_t i = group * relation_rows; i < end; i += tile_rows) {
    const S* a = panels + i / wide * wide * x.width + i % wide;
    for (int64_t j = 0; j < i + tile_rows; j += wide) {
      tile_product(x.width, a, 1, wide, panels + j * x.width, tile);
      for (int r = 0; r < tile_rows; r++)
        for (int c = 0; c < wide && j + c <= i + r; c++)
          x.gram[(i + r) * size + j + c] = x.gram[(j + c) * size + i + r] = tile[r * wide + c];
    }
  }
}

// A block of columns of edges X.
template <class S>
void gradient(const Relation& p, const Embeddings& x, int64_t block) {
  constexpr int wide = panel<S>, most = relation_columns / wide;
  const int64_t first = block * relation_columns, size = p.padded;
  const int n = columns_of(x, first), strips = (n + wide - 1) / wide;
  char* memory = (char*)__builtin_malloc((strips * wide + tile_rows) * size * sizeof(S) + 64);
  S* const strip = (S*)(memory + (64 - (uintptr_t)memory % 64));
  S* const edges = strip + strips * wide * size;  // of a tile's rows
  alignas(64) S scratch[relation_columns] = {}, mean[relation_columns] = {};
  for (int d = 0; x.mean && d < n; d++) mean[d] = S(x.mean[first + d]);
  for (int64_t k = 0; k < size; k++) {
    const S* row = scratch;
    if (k < p.rows) row = RowReader<S>{x.x, row_offset(x.x, k)}.get(first, n, scratch);
    if (row != scratch) __builtin_memcpy(scratch, row, n * sizeof(S));
    for (int s = 0; s < strips; s++)
      for (int c = 0; c < wide; c++)
        strip[(s * size + k) * wide + c] = scratch[s * wide + c] - mean[s * wide + c];
  }
  alignas(64) S tiles[most][tile_rows * wide];
  const S factor = S(x.factor);
  for (int64_t j = 0; j < p.rows; j += tile_rows) {
    for (int64_t k = 0; k < tile_rows * size; k++) edges[k] = S(x.edges[j * size + k]);
    for (int s = 0; s < strips; s++)
      tile_product(size, edges, size, 1, strip + s * size * wide, tiles[s]);
    for (int r = 0; r < tile_rows && j + r < p.rows; r++) {
      for (int s = 0; s < strips; s++)
        for (int c = 0; c < wide; c++) scratch[s * wide + c] = factor * tiles[s][r * wide + c];
      RowWriter<S>(x.grad, j + r, true).flush(first, n, scratch);
    }
  }
  __builtin_free(memory);
}
