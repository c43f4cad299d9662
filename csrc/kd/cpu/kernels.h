// SPDX-License-Identifier: Apache-2.0
// The CPU kernels, at the ISA level chosen for this machine. Each takes a range of rows, so that
// whoever calls it can split the work; the results do not depend on the split.
#pragma once
#include "../batchwise.h"
#include "../attention.h"
#include "../contrast.h"
#include "../ensemble.h"
#include "../maps.h"
#include "../product.h"
#include "../row_attention.h"
#include "../relation.h"
#include "../rowwise.h"
#include "../sparse.h"

namespace kd {

#define KD_KERNELS(X)                                                                    \
  X(ensemble, (const EnsembleParams&, int64_t begin, int64_t end))                       \
  X(rowwise, (const RowwiseParams&, int64_t begin, int64_t end))                         \
  X(sparse, (const TopKParams&, int64_t begin, int64_t end))                             \
  X(dist_measure, (const DistParams&, int64_t begin, int64_t end))                       \
  X(dist_columns, (const DistParams&, int64_t begin, int64_t end))                       \
  X(dist_emit, (const DistParams&, int64_t begin, int64_t end))                          \
  X(mlkd_softmax, (const MlkdParams&, int64_t begin, int64_t end))                       \
  X(mlkd_relate, (const MlkdRelations&, RelateStep, int64_t begin, int64_t end))         \
  X(mlkd_gradient, (const MlkdParams&, int64_t begin, int64_t end))                      \
  X(elementwise, (const ElementParams&, int64_t begin, int64_t end))                     \
  X(pyramid, (const PyramidParams&, int64_t begin, int64_t end))                         \
  X(spatial_attention, (const SpatialAttentionParams&, int64_t begin, int64_t end))      \
  X(relation, (const Relation&, RelationStep, int side, int64_t begin, int64_t end))     \
  X(gram_match, (const GramMatch&, int64_t begin, int64_t end))                          \
  X(nst_grams, (const NSTGrams&, int64_t begin, int64_t end))                            \
  X(neighbour_columns, (const Neighbours&, int64_t begin, int64_t end))                  \
  X(crd, (const CrdParams&, int64_t begin, int64_t end))                                 \
  X(negatives, (const NegativesParams&, int64_t begin, int64_t end))                     \
  X(scale_row, (const Rows& grad, int64_t row, int64_t classes, double factor))          \
  X(attention, (const ClassAttention&, AttentionStep, int64_t begin, int64_t end))       \
  X(row_attention, (const RowAttention&, RowStep, int64_t begin, int64_t end))           \
  X(product, (const Product&, int64_t begin, int64_t end))

struct Kernels {
  const char* isa;  // "baseline", "avx2" or "avx512"
#define KD_POINTER(name, arguments) void(*name) arguments;
  KD_KERNELS(KD_POINTER)
#undef KD_POINTER
};

// The best level that the machine has, or that KDKERNELS_CPU_CAPABILITY names (if it has it).
const Kernels& kernels();

// Below this many elements, a task is not worth handing to another thread.
constexpr int64_t grain = 16384;

inline int64_t rows_per_task(int64_t classes) {
  return classes >= grain ? 1 : grain / (classes > 0 ? classes : 1);
}

}  // namespace kd
