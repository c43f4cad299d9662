// SPDX-License-Identifier: Apache-2.0
// What one call of the contrast family is given.
#pragma once
#include "rows.h"

namespace kd {

// Their fields, in order, are those of CrdNumbers in kdkernels/ops/contrast.py.
struct CrdNumbers {
  double temperature = 0.07, eps = 1e-7;
};

// One side's embeddings, scored against the other side's bank. All are contiguous, of the type
// accumulated in.
struct CrdSide {
  const void* anchor = nullptr;  // (B, D)
  const void* bank = nullptr;    // (n, D)
  double normalizer = 1;         // Z
  void* grad = nullptr;          // (B, D) or null
};

struct CrdParams : CrdNumbers {
  int64_t samples = 0, dim = 0, negatives = 0, bank_rows = 0;
  bool in_double = false;
  double factor = 1;                 // of the loss, and so of the gradients
  CrdSide side[2];                   // the student's, the teacher's
  const int64_t* index = nullptr;    // (B,)
  const void* negative = nullptr;    // (B, K) of int64_t, or of int32_t
  bool narrow = false;               // they are int32_t
  int64_t negative_stride = 0;       // between samples

  int32_t* sorted = nullptr;         // (B, K): scratch, negatives by tile of the bank
  int32_t* starts = nullptr;         // (B, tiles + 1): scratch, where each tile's begin
  void* part = nullptr;              // (B, padded D): scratch of the type accumulated in
  double* sums = nullptr;            // (B, padded D + 8): scratch
  double* loss = nullptr;            // (2, B), without `factor`
  const int32_t** chosen = nullptr;  // (B,): the negatives by tile, null where one is no row
};

// Samples of other classes than each sample's own, of a data set of `rows` samples.
struct NegativesParams {
  int64_t count = 0, rows = 0;        // K, n
  const int64_t* labels = nullptr;    // (n,)
  const int64_t* shuffled = nullptr;  // (2 n,) the labels in the order of a shuffle, twice
  const int32_t* place = nullptr;     // (n,) of each sample in that order
  const int64_t* index = nullptr;     // (B,)
  const int64_t* begin = nullptr;     // (B,) the first place of which one is taken
  int32_t* drawn = nullptr;           // (B, K)
  uint8_t* fault = nullptr;           // (B,): 1 where no other class is there
};

// Fills `shuffled` and `place` from a permutation (n,).
static inline void crd_shuffle(const NegativesParams& p, const int64_t* shuffle, int64_t* shuffled,
                               int32_t* place) {
  for (int64_t j = 0; j < p.rows; j++) {
    shuffled[j] = shuffled[p.rows + j] = p.labels[shuffle[j]];
    place[shuffle[j]] = (int32_t)j;
  }
}

// Rows of the bank are visited tile by tile, a tile being what L1 holds, if a batch wants a
// row several times; else a tile is the whole bank. By the shape alone, on which the order of sums
// depends.
static inline int crd_tile_bits(const CrdParams& p) {
  constexpr int64_t tile_bytes = 1 << 15, uses = 4;
  if (p.samples * p.negatives < uses * p.bank_rows) return 31;
  const int64_t row = p.dim * (p.in_double ? 8 : 4);
  int bits = 0;
  while ((row << (bits + 1)) <= tile_bytes) bits++;
  return bits;
}
static inline int64_t crd_tiles(const CrdParams& p) {
  return ((p.bank_rows - 1) >> crd_tile_bits(p)) + 1;
}

// Columns of `part`: whole vectors of any level. In `sums` a tally is behind them, in a cache line
// that a sample of another thread has no part in.
static inline int64_t crd_padded(const CrdParams& p) { return (p.dim + 15) / 16 * 16; }
static inline int64_t crd_sums(const CrdParams& p) { return crd_padded(p) + 8; }

}  // namespace kd
