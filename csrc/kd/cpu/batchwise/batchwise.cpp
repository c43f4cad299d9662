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
#include "mlkd.h"
#include "relate.h"

inline bool in_double(const DistParams& p) {
  return p.student.dtype == DType::float64 || p.teacher.dtype == DType::float64;
}

void dist_measure(const DistParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++)
    in_double(p) ? measure_block<double>(p, b) : measure_block<float>(p, b);
}
void dist_columns(const DistParams& p, int64_t begin, int64_t end) {
  in_double(p) ? merge_columns<double>(p, begin, end) : merge_columns<float>(p, begin, end);
}
void dist_emit(const DistParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    in_double(p) ? emit_row<double>(p, i) : emit_row<float>(p, i);
}

void mlkd_softmax(const MlkdParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    p.in_double ? softmax_row<double>(p, i) : softmax_row<float>(p, i);
}
void mlkd_grams(const MlkdGrams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) p.in_double ? gram_row<double>(p, i) : gram_row<float>(p, i);
}
void mlkd_relate(const MlkdRelations& p, int64_t begin, int64_t end) {
  const bool wide = p.rows <= p.classes;
  const int64_t n = wide ? p.rows : p.classes, f = wide ? p.classes : p.rows;
  const int64_t size = relation_size(n, f) * (p.in_double ? 8 : 4) + 2 * (n + f) * 8 + 64;
  char* memory = (char*)__builtin_malloc(size + 64);
  char* aligned = memory + (64 - (uintptr_t)memory % 64);
  for (int64_t j = begin; j < end; j++)
    p.in_double ? relate<double>(p, j, aligned) : relate<float>(p, j, aligned);
  __builtin_free(memory);
}
void mlkd_gradient(const MlkdParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    p.in_double ? relation_row<double>(p, i) : relation_row<float>(p, i);
}

}  // namespace KD_ISA
}  // namespace kd
