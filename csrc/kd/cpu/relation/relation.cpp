// SPDX-License-Identifier: Apache-2.0
// Losses over relations; see rkd.h, pkt.h, grams.h and neighbours.h for what they fuse, run.h for the
// order of the steps.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../relation.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "gram.h"
#include "rkd.h"
#include "pkt.h"
#include "grams.h"
#include "neighbours.h"

void relation(const Relation& p, RelationStep step, int side, int64_t begin, int64_t end) {
  const Embeddings& x = p.side[side];
  for (int64_t i = begin; i < end; i++) switch (step) {
      case RelationStep::centre: centre(p, x, i); break;
      case RelationStep::pack: p.single ? pack<float>(p, x, i) : pack<double>(p, x, i); break;
      case RelationStep::gram: p.single ? gram_rows<float>(p, x, i) : gram_rows<double>(p, x, i); break;
      case RelationStep::rkd_lengths: rkd_lengths(p, i); break;
      case RelationStep::rkd_pairs: rkd_pairs(p, i); break;
      case RelationStep::rkd_triples: rkd_triples(p, x, p.side[1 - side], 2 * i); break;
      case RelationStep::rkd_edges: rkd_edges(p, side, i); break;
      case RelationStep::pkt_sums: pkt_sums(p, i); break;
      case RelationStep::pkt_rows: pkt_rows(p, i); break;
      case RelationStep::pkt_edges: side ? pkt_edges<1>(p, i) : pkt_edges<0>(p, i); break;
      case RelationStep::polynomial_rows: polynomial_rows(p, i); break;
      case RelationStep::polynomial_edges: polynomial_edges(p, side, i); break;
      case RelationStep::gradient: p.single ? gradient<float>(p, x, i) : gradient<double>(p, x, i); break;
    }
}
void gram_match(const GramMatch& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m++) p.in_double ? match<double>(p, m) : match<float>(p, m);
}
void nst_grams(const NSTGrams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m++) p.in_double ? nst<double>(p, m) : nst<float>(p, m);
}
void neighbour_columns(const Neighbours& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++) neighbours(p, b);
}

}  // namespace KD_ISA
}  // namespace kd
