// SPDX-License-Identifier: Apache-2.0
// Losses over feature maps: what their kernels are given and fill in.
#pragma once
#include <stdint.h>

#include "rows.h"

namespace kd {

// Sums over elements; the formulas are in elementwise.h. As KINDS in kdkernels/ops/maps/
// elementwise.py.
enum class ElementKind : int64_t { square, ofd, ab, count };

struct ElementNumbers {
  double margin = 1;
};
struct ElementChoices {
  ElementKind kind = ElementKind::square;
};

// Maps that are dense in one order are rows of `length` elements, the last one perhaps short: the
// spatial part of a channel where that is innermost, the channels of a pixel where these are. What
// the formula's parameter is, a number a channel or a mask, is then a number a row or rows of its
// own, of class_stride 0 or 1.
struct ElementParams : ElementNumbers, ElementChoices {
  int64_t size = 0, length = 1;
  Rows student, teacher;            // all their elements as one row
  Rows parameter;                   // of the type accumulated in, or null
  Rows grad_student, grad_teacher;  // null where not asked for
  double factor = 1;                // of the gradients
  double* loss = nullptr;           // (tasks,), without a factor
  // The gradient to the parameter, or null: (rows,), or where it differs along a row (tasks, length).
  double *row_slope = nullptr, *column_slope = nullptr;
};

// Sizes of maps (B, C, ...) and the parameter's strides over batch, channels and places, 0 where it
// has but one; false where it does not lie as the maps do.
static inline bool lay_out(ElementParams& p, int64_t batch, int64_t channels, int64_t places,
                           bool channels_last, const int64_t (&strides)[3]) {
  p.size = batch * channels * places;
  const bool by_channel = places > 1 && !channels_last;
  p.length = by_channel ? places : channels;
  p.parameter.inner = by_channel ? channels : places;
  p.parameter.outer_stride = strides[0];
  p.parameter.inner_stride = strides[by_channel ? 1 : 2];
  p.parameter.class_stride = strides[by_channel ? 2 : 1];
  if (!p.parameter.data) p.length = 16384;  // any: a row may be any part of the maps
  return p.parameter.class_stride == 0 || p.parameter.class_stride == 1;
}

// Elements are split by whole rows; the partition depends on the shape alone, so that sums are the
// same for any number of threads.
static inline int64_t element_rows(const ElementParams& p) {
  constexpr int64_t elements = 16384;
  return p.length < elements ? elements / p.length : 1;
}
static inline int64_t element_tasks(const ElementParams& p) {
  const int64_t each = element_rows(p) * p.length;
  return (p.size + each - 1) / each;
}
// Numbers of the gradient to a parameter per channel; number i is of channel i % C.
static inline int64_t element_slopes(const ElementParams& p) {
  return p.parameter.class_stride == 1 ? element_tasks(p) * p.length : p.size / p.length;
}

// Maps (B, C, P), P positions, as rows of elements that lie together: B C of P elements, or, where
// channels are last, B P of C. Rows of no data where a gradient is not asked for.
struct Maps {
  Rows rows;
  int64_t channels = 0, positions = 0;
  bool channels_last = false;
};

// DISTANCES of kdkernels/ops/maps/spatial_attention.py.
enum MapDistance : int64_t { squared, absolute, norm_of_it };

struct SpatialAttentionChoices {
  int64_t power = 2, distance = squared;
};
struct SpatialAttentionParams : SpatialAttentionChoices {
  int64_t samples = 0;
  Maps student, teacher, grad_student, grad_teacher;  // of one number of positions
  double factor = 1;              // of the gradients
  double* sample_loss = nullptr;  // (B,)
};

// One axis of maps, cut at the edges of every level's bins.
struct PyramidAxis {
  int64_t size = 0, segments = 0;
  const int64_t* edge = nullptr;  // (segments + 1,)
  const int64_t *first = nullptr, *last = nullptr;  // (bins of all levels,): segments of each
};

struct PyramidParams {
  int64_t samples = 0, channels = 0;
  PyramidAxis y, x;
  bool channels_last = false;     // rows as those of Maps
  Rows student, teacher, grad_student, grad_teacher;
  int64_t levels = 0;
  const int64_t* level = nullptr;   // (levels,): bins along an axis
  const double* weight = nullptr;   // (1 + levels,): of the maps themselves, then of the levels
  double factor = 1;                // of the gradients
  double* task_loss = nullptr;      // (B pyramid_tasks_per_sample,) times H W
};

// Channels that a task takes, so that their bins are summed by vectors.
constexpr int most_pyramid_channels = 64;
static inline int pyramid_channels_per_task(const PyramidParams& p) {
  return p.channels_last ? most_pyramid_channels : 16;
}
static inline int64_t pyramid_tasks_per_sample(const PyramidParams& p) {
  const int64_t together = pyramid_channels_per_task(p);
  return (p.channels + together - 1) / together;
}
// Room for a line of the map, or several that fill a vector.
static inline int64_t pyramid_line(const PyramidParams& p) { return p.x.size + 16; }

}  // namespace kd
