// SPDX-License-Identifier: Apache-2.0
// What every family's backward does to a saved gradient whose upstream is not 1: one read and one
// write of it.
#include <stdint.h>
#if KD_BYTES > 16  // AVX2 and AVX-512
#include <immintrin.h>
#endif

#include "../../rows.h"

namespace kd {
namespace KD_ISA {
#include "../simd.h"
#include "../staging.h"
#include "../sweep.h"

void scale_row(const Rows& grad, int64_t row, int64_t classes, double factor) {
  const RowWriter<float> out(grad, row, false);
  const RowReader<float> in{grad, row_offset(grad, row)};
  if (grad.dtype == DType::float64) {
    double* p = (double*)grad.data + row_offset(grad, row);
    for (int64_t i = 0; i < classes; i++) p[i * grad.class_stride] *= factor;
    return;
  }
  alignas(64) float buffer_in[block], buffer_out[block];
  for_blocks(classes, [&](int64_t first, int n) {
    const float* from = in.get(first, n, buffer_in);
    float* to = out.at(first, buffer_out);
    for (int i = 0; i < n; i++) to[i] = from[i] * (float)factor;
    out.flush(first, n, to);
  });
}

}  // namespace KD_ISA
}  // namespace kd
