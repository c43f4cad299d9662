// SPDX-License-Identifier: Apache-2.0
// Losses that relate a batch's rows to each other; see dist.h and mlkd.h for what they fuse.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../batchwise.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"
#include "softmax.h"
#include "dist.h"
#include "dist_emit.h"
#include "mlkd.h"
#include "product.h"
#include "relate.h"

void dist_measure(const DistParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++)
    in_double(p) ? measure_block<double>(p, b) : measure_block<float>(p, b);
}
void dist_columns(const DistParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    in_double(p) ? merge_columns<double>(p, i) : merge_columns<float>(p, i);
}
void dist_emit(const DistParams& p, int64_t begin, int64_t end) {
  for (int64_t i = end; i-- > begin;)  // the last ones first: they were measured last
    in_double(p) ? emit_row<double>(p, i) : emit_row<float>(p, i);
}

void mlkd_softmax(const MlkdParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    p.in_double ? softmax_row<double>(p, i) : softmax_row<float>(p, i);
}
void mlkd_relate(const MlkdRelations& p, RelateStep step, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    p.in_double ? Relation<double>(p).run(step, i) : Relation<float>(p).run(step, i);
}
void mlkd_gradient(const MlkdParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    p.in_double ? relation_row<double>(p, i) : relation_row<float>(p, i);
}

}  // namespace KD_ISA
}  // namespace kd
