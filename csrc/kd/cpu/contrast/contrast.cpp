// SPDX-License-Identifier: Apache-2.0
// CRD: scores of embeddings against chosen rows of a memory bank, the loss of these scores, and the
// gradient to the embeddings, in one pass over the rows. Of B K chosen rows nothing is stored but
// their numbers (4 bytes each): a batch of rows is scored, its probabilities are found, and it is
// added to the gradient while it is in L1. Eager copies the rows, 4 D bytes each, and reads the
// copies four times.
//
// A sample's negatives are first sorted by tiles of the bank, and the samples take turns on a tile: a
// bank is then read from memory once, and not B K / n times, each tile while the one before is at
// work. Where it is so large that this would help little, its rows are prefetched a batch ahead.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../contrast.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"

constexpr int batch = 32;  // rows scored before their probabilities are found
constexpr int group = 8;   // rows scored at once: independent sums hide the latency of additions
constexpr int line = 64;   // bytes

// Products of `group` rows with one vector.
template <class S>
KD_FN void dots(const S* const* row, const S* v, int dim, S* out) {
  using V = typename VectorOf<S>::V;
  V sums[group] = {};
  sweep<V>(dim, [&](int d, auto w) {
    const V x = read<V>(v + d, w, S(0));
    for (int r = 0; r < group; r++) sums[r] += x * read<V>(row[r] + d, w, S(0));
  });
  for (int r = 0; r < group; r++) out[r] = sum(sums[r]);
}

// to += the sum of weight[r] row[r] over a batch, of `vectors` vectors at column d.
template <int vectors, class S, class W>
KD_FN void add_columns(const S* const* row, const S* weight, int rows, int d, W w, double* to) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  V sums[vectors] = {};
  for (int r = 0; r < rows; r++) {
    const V c = all<V>(weight[r]);
    for (int j = 0; j < vectors; j++) sums[j] += c * read<V>(row[r] + d + j * width, w, S(0));
  }
  S found[vectors * width];
  for (int j = 0; j < vectors; j++) store(found + j * width, sums[j]);
  for (int i = 0; i < vectors * width; i++) to[d + i] += found[i];
}
template <class S>
KD_FN void add_rows(const S* const* row, const S* weight, int rows, int dim, double* to) {
  constexpr int width = Lanes<typename VectorOf<S>::V>::count, most = 8;
  int d = 0;
  for (; d + most * width <= dim; d += most * width)
    add_columns<most>(row, weight, rows, d, Whole{}, to);
  for (; d + width <= dim; d += width) add_columns<1>(row, weight, rows, d, Whole{}, to);
  if (d < dim) add_columns<1>(row, weight, rows, d, Part{dim - d}, to);
}

// Loss and gradient of one sample on one side.
template <class S>
struct Anchor {
  const CrdParams& p;
  const CrdSide& side;
  const S* v;
  double* sums;  // padded to whole vectors
  S rate, shift;
  bool far;  // the rows are not in a cache
  double loss = 0;

  // Adds the rows `id`: as negatives, c / (P + c), where sign is 1, as positives, P / (P + c),
  // where it is -1. Both are sigmoids, of u = score / temperature - log(c Z) or its negative.
  void add(const int32_t* id, int64_t n, S sign) {
    using V = typename VectorOf<S>::V;
    constexpr S none = S(-__builtin_inf());
    const int dim = (int)p.dim;
    const S* const bank = (const S*)side.bank;
    for (int64_t first = 0; first < n; first += batch) {
      const int rows = n - first < batch ? (int)(n - first) : batch;
      const S* row[batch];
      alignas(64) S score[batch], weight[batch];
      for (int r = 0; r < batch; r++) row[r] = bank + p.dim * id[first + (r < rows ? r : 0)];
      for (int64_t k = first + batch; far && k < first + 2 * batch && k < n; k++)
        for (int d = 0; d < dim; d += line / sizeof(S))
          __builtin_prefetch(bank + p.dim * id[k] + d);
      for (int r = 0; r < rows; r += group) dots(row + r, v, dim, score + r);
      for (int r = rows; r < batch; r++) score[r] = sign * none;
      V losses{};
      for (int r = 0; r < batch; r += Lanes<V>::count) {
        const V u = (load<V>(score + r) * rate - shift) * sign;
        const V e = exp(-magnitude(u));
        losses += at_least(u, V{}) + log1p_parts(e).value;
        store(weight + r, select(u < V{}, e, all<V>(S(1))) / (S(1) + e) * sign);
      }
      loss += sum(losses);
      if (side.grad) add_rows(row, weight, rows, dim, sums);
    }
  }
};

// The negatives of sample i by tile, in their order within a tile.
inline bool sort_by_tile(const CrdParams& p, int64_t i, int bits, int64_t tiles) {
  const int64_t* const from = p.negative + i * p.negative_stride;
  int32_t *const to = p.sorted + i * p.negatives, *const start = p.starts + i * (tiles + 1);
  __builtin_memset(start, 0, (tiles + 1) * sizeof *start);
  bool sound = p.index[i] >= 0 && p.index[i] < p.bank_rows;
  for (int64_t k = 0; k < p.negatives && sound; k++) {
    sound = from[k] >= 0 && from[k] < p.bank_rows;
    if (sound) start[from[k] >> bits]++;
  }
  if (!sound) return false;
  int32_t before = 0;
  for (int64_t t = 0; t <= tiles; t++) {
    const int32_t count = start[t];
    start[t] = before, before += count;
  }
  for (int64_t k = 0; k < p.negatives; k++) to[start[from[k] >> bits]++] = (int32_t)from[k];
  for (int64_t t = tiles; t > 0; t--) start[t] = start[t - 1];  // ends are the next one's begins
  start[0] = 0;
  return true;
}

template <class S>
void contrast(const CrdParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;  // a thread may be given nothing
  const int bits = crd_tile_bits(p);
  const int64_t tiles = crd_tiles(p), padded = crd_padded(p);
  const double expected = (double)p.negatives / p.bank_rows, c = expected + p.eps;
  const double constant = -p.negatives * __builtin_log(expected / c);
  const int64_t row_bytes = p.dim * sizeof(S), bank_bytes = row_bytes * p.bank_rows;
  const int64_t tile_bytes = row_bytes << bits, share = tile_bytes / (end - begin) + 1;
  for (int64_t i = begin; i < end; i++) p.fault[i] = !sort_by_tile(p, i, bits, tiles);
  for (int k = 0; k < 2; k++) {
    const CrdSide& side = p.side[k];
    const auto anchor = [&](int64_t i) {
      return Anchor<S>{p, side, (const S*)side.anchor + i * p.dim, p.sums + i * padded,
                       S(1 / p.temperature), S(__builtin_log(c * side.normalizer)), tiles == 1};
    };
    double* const loss = p.loss + k * p.samples;
    for (int64_t i = begin; i < end; i++) {
      __builtin_memset(p.sums + i * padded, 0, padded * sizeof *p.sums);
      loss[i] = constant;
    }
    const char* const bank = (const char*)side.bank;
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t i = begin; i < end; i++) {
        // The next tile comes into L2 meanwhile, a share of it with every sample.
        int64_t next = (t + 1) * tile_bytes + (i - begin) * share;
        const int64_t stop = next + share < bank_bytes ? next + share : bank_bytes;
        for (; next < stop; next += line) __builtin_prefetch(bank + next, 0, 2);
        if (p.fault[i]) continue;
        const int32_t* const start = p.starts + i * (tiles + 1) + t;
        Anchor<S> a = anchor(i);
        a.add(p.sorted + i * p.negatives + start[0], start[1] - start[0], S(1));
        loss[i] += a.loss;
      }
    for (int64_t i = begin; i < end; i++) {
      if (p.fault[i]) continue;
      const int32_t positive = (int32_t)p.index[i];
      Anchor<S> a = anchor(i);
      a.add(&positive, 1, S(-1));
      loss[i] += a.loss;
      S* const grad = (S*)side.grad + i * p.dim;
      for (int64_t d = 0; side.grad && d < p.dim; d++)
        grad[d] = S(a.sums[d] * (p.factor / p.temperature));
    }
  }
}

void crd(const CrdParams& p, int64_t begin, int64_t end) {
  p.in_double ? contrast<double>(p, begin, end) : contrast<float>(p, begin, end);
}

}  // namespace KD_ISA
}  // namespace kd
