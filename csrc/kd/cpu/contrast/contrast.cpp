// SPDX-License-Identifier: Apache-2.0
// CRD: scores of embeddings against chosen rows of a memory bank, the loss of these scores, and the
// gradient to the embeddings, in one pass over the rows. Of B K chosen rows nothing is stored but
// their numbers (4 bytes each): a batch of rows is scored, its probabilities are found, and it is
// added to the gradient while it is in L1. Eager copies the rows, 4 D bytes each, and reads the
// copies four times.
//
// A sample's negatives are read in the order of tiles of the bank, and the samples take turns on a
// tile: a bank is then read from memory once, and not B K / n times, each tile while the one before
// is at work. Where it is so large that this would help little, its rows are prefetched a batch
// ahead.
//
// A batch is scored while the probabilities of the one before, a long chain of operations, are
// found, and the one before that is added.
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
#include "negatives.h"

constexpr int batch = 32;     // rows scored before their probabilities are found
constexpr int group = 8;      // rows scored at once: independent sums hide the latency of additions
constexpr int gathered = 32;  // batches of a sample that are summed in S before they are in double
constexpr int line = 64;      // bytes

// Of a and b, seen as parts of so many lanes, the sums of either half of each part.
template <int part, class V>
KD_FN V fold(V a, V b) {
  constexpr int width = Lanes<V>::count;
  typename Lanes<V>::I first;
  for (int i = 0; i < width; i++) first[i] = i / (part / 2) * part + i % (part / 2);
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + part / 2);
}
// The sums over the lanes of n vectors, in their order in the first lanes of those that are left.
template <int n, int part, class V>
KD_FN void fold_all(V* x) {
  if constexpr (part > 1) {
    constexpr int left = n > 1 ? n / 2 : 1;
    for (int j = 0; j < left; j++) x[j] = fold<part>(x[2 * j % n], x[(2 * j + 1) % n]);
    fold_all<left, part / 2>(x);
  }
}

// Products of the rows id[0], ..., id[group - 1] with one vector.
template <class S>
KD_FN void dots(const S* bank, const int32_t* id, const S* v, int64_t dim, S* out) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  const S* row[group];
  for (int r = 0; r < group; r++) row[r] = bank + dim * id[r];
  V sums[group] = {};
  sweep<V>((int)dim, [&](int d, auto w) {
    const V x = read<V>(v + d, w, S(0));
    for (int r = 0; r < group; r++) sums[r] += x * read<V>(row[r] + d, w, S(0));
  });
  fold_all<group, width>(sums);
  for (int r = 0; r < group; r += width) store(out + r, sums[r / width]);
}

template <int n> struct Vectors { static constexpr int count = n; };

// to += the sum of weight[r] times row id[r] over a batch, of `vectors` vectors at column d.
template <int vectors, class S, class W>
KD_FN void add_columns(const S* bank, const int32_t* id, const S* weight, int rows, int64_t dim,
                       int64_t d, W w, S* to) {
  using V = typename VectorOf<S>::V;
  constexpr int width = Lanes<V>::count;
  V sums[vectors] = {};
  for (int r = 0; r < rows; r++) {
    const V c = all<V>(weight[r]);
    const S* const row = bank + dim * id[r] + d;
    for (int j = 0; j < vectors; j++) sums[j] += c * read<V>(row + j * width, w, S(0));
  }
  for (int j = 0; j < vectors; j++) {
    S* const at = to + d + j * width;
    store(at, load<V>(at) + sums[j]);
  }
}

struct Tally {
  double loss;
  int64_t batches;  // that `part` has the sums of
};

// What is found for a sample. Sums of some batches are gathered in S, and these in double.
template <class S>
struct Sample {
  const S* anchor = nullptr;
  int64_t columns = 0;  // of `part` and `sums`
  S* part = nullptr;
  double* sums = nullptr;
  Tally* tally = nullptr;

  KD_FN void drain() const {
    for (int64_t d = 0; d < columns; d++) {
      sums[d] += part[d];
      part[d] = 0;
    }
    tally->batches = 0;
  }
};

// One bank's rows, asked for by one sample after another.
template <class S>
struct Side {
  using V = typename VectorOf<S>::V;
  static constexpr int width = Lanes<V>::count;

  struct Batch {
    alignas(64) int32_t id[batch + group] = {};
    int rows = 0;
    S sign = 0;
    Sample<S> of;
    alignas(64) S weight[batch + width] = {};  // a score before

    // The first of some rows, filled up with one of them to whole groups: copied, because a group
    // that went on into the next tile would wait for rows that are not in L1.
    KD_FN void take(const int32_t* from, int64_t n) {
      rows = n < batch ? (int)n : batch;
      const auto copy = [&](int r) { __builtin_memcpy(id + r, from + r, group * sizeof *id); };
      for (int r = 0; r + group <= rows; r += group) copy(r);
      if (rows >= group) copy(rows - group);
      else for (int r = 0; r < rows; r++) id[r] = from[r];
      for (int r = 0; r < group; r++) id[rows + r] = from[0];
    }
  };

  const S* const bank;
  const int64_t dim;
  const S rate, shift;
  const bool gradient, far;  // the rows are not in a cache
  Batch batches[3] = {};     // to be scored, weighed, added
  int turn = 0;

  // To the sample's loss and the sums of its gradient, the rows `id`: as negatives, c / (P + c),
  // where sign is 1, as positives, P / (P + c), where it is -1. Both are sigmoids, of
  // u = score / temperature - log(c Z) or its negative.
  void ask(const Sample<S>& sample, const int32_t* id, int64_t n, S sign) {
    for (int64_t first = 0; first < n; first += batch) {
      Batch& now = batches[turn];
      now.take(id + first, n - first);
      now.of = sample, now.sign = sign;
      for (int64_t k = first + batch; far && k < first + 2 * batch && k < n; k++)
        for (int d = 0; d < dim; d += line / sizeof(S))
          __builtin_prefetch(bank + dim * id[k] + d);
      for (int r = 0; r < now.rows; r += group)
        dots(bank, now.id + r, sample.anchor, dim, now.weight + r);
      store(now.weight + now.rows, all<V>(sign * S(-__builtin_inf())));
      advance();
    }
  }
  void finish() {
    for (int stage = 0; stage < 2; stage++) batches[turn].rows = 0, advance();
  }

  KD_FN void advance() {
    weigh(batches[(turn + 2) % 3]);
    turn = (turn + 1) % 3;
    add(batches[turn]);
  }

  // Weights from scores. The logarithms of 1 + e are one of their product.
  KD_FN void weigh(Batch& b) {
    V above{}, product{};  // less 1
    for (int r = 0; r < b.rows; r += width) {
      const V u = (load<V>(b.weight + r) * rate - shift) * b.sign;
      const V e = exp(-magnitude(u));
      above += at_least(u, V{});
      product += e + product * e;
      store(b.weight + r, select(u < V{}, e, all<V>(S(1))) / (S(1) + e) * b.sign);
    }
    if (b.rows) b.of.tally->loss += sum(above + log1p_parts(product).value);
  }

  KD_FN void add(const Batch& b) {
    constexpr int most = 8;
    const auto columns = [&](auto vectors, int64_t d, auto w) {
      add_columns<vectors.count>(bank, b.id, b.weight, b.rows, dim, d, w, b.of.part);
    };
    if (!b.rows || !gradient) return;
    int64_t d = 0;
    for (; d + most * width <= dim; d += most * width) columns(Vectors<most>{}, d, Whole{});
    for (; d + width <= dim; d += width) columns(Vectors<1>{}, d, Whole{});
    if (d < dim) columns(Vectors<1>{}, d, Part{(int)(dim - d)});
    if (++b.of.tally->batches == gathered) b.of.drain();
  }
};

// The negatives of sample i tile by tile, in their order within a tile, and where each tile's begin
// in `starts`; null if one of them is no row. Ascending ones, as this library draws them, are read
// where they lie.
template <class I>
const int32_t* by_tile(const CrdParams& p, int64_t i, int bits, int64_t tiles) {
  const I* const from = (const I*)p.negative + i * p.negative_stride;
  int32_t* const to = p.sorted + i * p.negatives;
  int32_t* const start = p.starts + i * (tiles + 1);
  const auto row = [&](int64_t k) { return (uint64_t)k < (uint64_t)p.bank_rows; };
  bool ascending = true, rows = row(p.index[i]);
  for (int64_t k = 1; k < p.negatives; k++) ascending &= from[k - 1] <= from[k];
  if (ascending) rows &= row(from[0]) & row(from[p.negatives - 1]);
  for (int64_t k = 0; k < p.negatives && !ascending; k++) rows &= row(from[k]);
  if (!rows) return nullptr;
  __builtin_memset(start, 0, (tiles + 1) * sizeof *start);
  if (ascending) {
    for (int64_t k = 0; k < p.negatives; k++) start[(from[k] >> bits) + 1] = (int32_t)(k + 1);
    for (int64_t t = 1; t <= tiles; t++)
      if (start[t] < start[t - 1]) start[t] = start[t - 1];
    if (sizeof(I) == sizeof *to) return (const int32_t*)from;
    for (int64_t k = 0; k < p.negatives; k++) to[k] = (int32_t)from[k];
  } else {
    for (int64_t k = 0; k < p.negatives; k++) start[from[k] >> bits]++;
    for (int64_t t = 1; t <= tiles; t++) start[t] += start[t - 1];
    for (int64_t k = p.negatives; k-- > 0;) to[--start[from[k] >> bits]] = (int32_t)from[k];
  }
  return to;
}

template <class S>
void contrast(const CrdParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;  // a thread may be given nothing
  const int bits = crd_tile_bits(p);
  const int64_t tiles = crd_tiles(p), padded = crd_padded(p), summed = crd_sums(p);
  const double expected = (double)p.negatives / p.bank_rows, c = expected + p.eps;
  const double constant = -p.negatives * __builtin_log(expected / c);
  const int64_t row_bytes = p.dim * sizeof(S), bank_bytes = row_bytes * p.bank_rows;
  const int64_t tile_bytes = row_bytes << bits, share = tile_bytes / (end - begin) + 1;
  const auto tiled = p.narrow ? by_tile<int32_t> : by_tile<int64_t>;
  for (int64_t i = begin; i < end; i++) p.chosen[i] = tiled(p, i, bits, tiles);
  for (int k = 0; k < 2; k++) {
    const CrdSide& given = p.side[k];
    const auto sample = [&](int64_t i) {
      double* const sums = p.sums + i * summed;
      return Sample<S>{(const S*)given.anchor + i * p.dim, padded, (S*)p.part + i * padded, sums,
                       (Tally*)(sums + padded)};
    };
    const S shift = S(__builtin_log(c * given.normalizer));
    Side<S> side{(const S*)given.bank, p.dim, S(1 / p.temperature), shift, given.grad != nullptr,
                 tiles == 1};
    for (int64_t i = begin; i < end; i++) {
      __builtin_memset((S*)p.part + i * padded, 0, padded * sizeof(S));
      __builtin_memset(p.sums + i * summed, 0, padded * sizeof(double));
      *sample(i).tally = {constant, 0};
    }
    const char* const bank = (const char*)given.bank;
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t i = begin; i < end; i++) {
        // The next tile comes into L2 meanwhile, a share of it with every sample.
        int64_t next = (t + 1) * tile_bytes + (i - begin) * share;
        const int64_t stop = next + share < bank_bytes ? next + share : bank_bytes;
        for (; next < stop; next += line) __builtin_prefetch(bank + next, 0, 2);
        if (!p.chosen[i]) continue;
        const int32_t* const start = p.starts + i * (tiles + 1) + t;
        side.ask(sample(i), p.chosen[i] + start[0], start[1] - start[0], S(1));
      }
    for (int64_t i = begin; i < end; i++) {
      if (!p.chosen[i]) continue;
      const int32_t positive[group] = {(int32_t)p.index[i]};
      side.ask(sample(i), positive, 1, S(-1));
      side.finish();
      const Sample<S> found = sample(i);
      found.drain();
      p.loss[k * p.samples + i] = found.tally->loss;
      S* const grad = (S*)given.grad + i * p.dim;
      for (int64_t d = 0; given.grad && d < p.dim; d++)
        grad[d] = S(found.sums[d] * (p.factor / p.temperature));
    }
  }
}

void crd(const CrdParams& p, int64_t begin, int64_t end) {
  p.in_double ? contrast<double>(p, begin, end) : contrast<float>(p, begin, end);
}

}  // namespace KD_ISA
}  // namespace kd
