// SPDX-License-Identifier: Apache-2.0
// Hierarchical context loss: the mean square of a difference of maps and of its average poolings.
//
// Bins of all levels are unions of the segments between their edges, so one pass over the maps takes
// the segments' sums, whatever the levels and however their bins overlap, and a second one, from L1
// or L2, adds to each element's own gradient what its segment gets from the bins. Both maps are read
// once from memory and the gradient written once: 12 bytes an element in fp32; no pooled map, and no
// difference, is stored. Included inside an ISA level's namespace.

// From the sums of segments (Y, X, n) to what each adds to the gradient, `field`; returns the loss of
// the levels. The numbers of n channels lie together. All is times the number of positions,
// so that gradients are near differences in size.
template <class S>
KD_FN double pool(const PyramidParams& p, S* segments, S* field, int n) {
  const int64_t across = p.x.segments;
  const int64_t size = p.y.segments * across * n;
  const double positions = (double)(p.y.size * p.x.size);
  for (int64_t i = 0; i < size; i++) field[i] = 0;
  alignas(64) S mean[most_pyramid_channels];
  double loss = 0;
  int64_t start = 0;  // of the level's bins, along either axis
  for (int64_t k = 0; k < p.levels; start += p.level[k++]) {
    const double weight = p.weight[k + 1] * positions / (double)(p.level[k] * p.level[k]);
    for (int64_t i = start; i < start + p.level[k]; i++)
      for (int64_t j = start; j < start + p.level[k]; j++) {
        const double area = (double)(p.y.edge[p.y.last[i]] - p.y.edge[p.y.first[i]]) *
                            (p.x.edge[p.x.last[j]] - p.x.edge[p.x.first[j]]);
        for (int c = 0; c < n; c++) mean[c] = 0;
        for (int64_t y = p.y.first[i]; y < p.y.last[i]; y++)
          for (int64_t x = p.x.first[j]; x < p.x.last[j]; x++)
            for (int c = 0; c < n; c++) mean[c] += segments[(y * across + x) * n + c];
        for (int c = 0; c < n; c++) {
          mean[c] *= (S)(1 / area);
          loss += weight * mean[c] * mean[c];
          mean[c] *= (S)(2 * weight / area);
        }
        for (int64_t y = p.y.first[i]; y < p.y.last[i]; y++)
          for (int64_t x = p.x.first[j]; x < p.x.last[j]; x++)
            for (int c = 0; c < n; c++) field[(y * across + x) * n + c] += mean[c];
      }
  }
  return loss;
}

template <class S>
struct Sides {
  RowReader<S> student, teacher;
  RowWriter<S> of_student, of_teacher;
  S factor_s, factor_t;
  Sides(const PyramidParams& p, int64_t r)
      : student{p.student, r * p.student.inner_stride}, teacher{p.teacher, r * p.teacher.inner_stride},
        of_student(p.grad_student, r, false), of_teacher(p.grad_teacher, r, false),
        factor_s((S)p.factor), factor_t((S)-p.factor) {}

  // body(i, w, d) for the differences d of elements [first, first + n), n at most a block.
  template <class Body>
  KD_FN void differences(int64_t first, int n, const Body& body) const {
    using V = typename VectorOf<S>::V;
    alignas(64) S scratch_s[block], scratch_t[block];
    const S *s = student.get(first, n, scratch_s), *t = teacher.get(first, n, scratch_t);
    sweep<V>(n, [&](int i, auto w) {
      body(i, w, read<V>(s + i, w, S(0)) - read<V>(t + i, w, S(0)));
    });
  }
  // The gradients there: own * d + of_segment.
  KD_FN void emit(int64_t first, int n, S own, const S* of_segment) const {
    using V = typename VectorOf<S>::V;
    alignas(64) S scratch_s[block], scratch_t[block];
    S* to_s = of_student.wanted() ? of_student.at(first, scratch_s) : nullptr;
    S* to_t = of_teacher.wanted() ? of_teacher.at(first, scratch_t) : nullptr;
    differences(first, n, [&](int i, auto w, V d) {
      const V value = d * own + read<V>(of_segment + i, w, S(0));
      if (to_s) write<V>(to_s + i, w, value * factor_s);
      if (to_t) write<V>(to_t + i, w, value * factor_t);
    });
    if (to_s) of_student.flush(first, n, to_s);
    if (to_t) of_teacher.flush(first, n, to_t);
  }
};

// The channels of a sample that a task takes, and how.
struct Channels {
  int64_t sample, first;
  int count;
  Channels(const PyramidParams& p, int64_t task) {
    const int64_t tasks = pyramid_tasks_per_sample(p), together = pyramid_channels_per_task(p);
    sample = task / tasks, first = task % tasks * together;
    count = (int)(p.channels - first < together ? p.channels - first : together);
  }
};

// Maps whose rows are channels: H x W elements each.
template <class S>
KD_FN void pyramid_planes(const PyramidParams& p, int64_t task, S* room) {
  using V = typename VectorOf<S>::V;
  const Channels channels(p, task);
  const int64_t width = p.x.size, grid = p.y.segments * p.x.segments, n = channels.count;
  S *line = room, *segments = line + pyramid_line(p), *field = segments + grid * n;
  // Lines of a map narrower than a vector are taken several at a time.
  const auto lines_at_once = [&](int64_t y) {
    const int64_t height = p.y.edge[y + 1] - p.y.edge[y];
    int64_t lines = Lanes<V>::count / width < height ? Lanes<V>::count / width : height;
    while (lines > 1 && height % lines) lines--;
    return lines > 1 ? lines : 1;
  };
  double loss = 0;
  V squares{};
  for (int64_t c = 0; c < n; c++) {
    const Sides<S> sides(p, channels.sample * p.channels + channels.first + c);
    for (int64_t y = 0; y < p.y.segments; y++) {
      const int64_t stretch = lines_at_once(y) * width;
      for (int64_t x = 0; x < stretch; x++) line[x] = 0;
      for (int64_t at = p.y.edge[y] * width; at < p.y.edge[y + 1] * width; at += stretch)
        for_blocks(stretch, [&](int64_t first, int n) {
          S* to = line + first;
          sides.differences(at + first, n, [&](int i, auto w, V d) {
            squares += d * d;
            write<V>(to + i, w, read<V>(to + i, w, S(0)) + d);
          });
        });
      if (stretch > Lanes<V>::count) loss += sum(squares), squares = V{};
      for (int64_t x = 0; x < p.x.segments; x++) {
        S total = 0;
        for (int64_t k = 0; k < stretch; k += width)
          for (int64_t i = k + p.x.edge[x]; i < k + p.x.edge[x + 1]; i++) total += line[i];
        segments[(y * p.x.segments + x) * n + c] = total;
      }
    }
  }
  loss += sum(squares);
  p.task_loss[task] = p.weight[0] * loss + pool(p, segments, field, (int)n);
  if (!p.grad_student.data && !p.grad_teacher.data) return;
  for (int64_t c = 0; c < n; c++) {
    const Sides<S> sides(p, channels.sample * p.channels + channels.first + c);
    for (int64_t y = 0; y < p.y.segments; y++) {
      const int64_t stretch = lines_at_once(y) * width;
      for (int64_t x = 0; x < p.x.segments; x++)
        for (int64_t k = 0; k < stretch; k += width)
          for (int64_t i = k + p.x.edge[x]; i < k + p.x.edge[x + 1]; i++)
            line[i] = field[(y * p.x.segments + x) * n + c];
      for (int64_t at = p.y.edge[y] * width; at < p.y.edge[y + 1] * width; at += stretch)
        for_blocks(stretch, [&](int64_t first, int n) {
          sides.emit(at + first, n, (S)(2 * p.weight[0]), line + first);
        });
    }
  }
}

// Channels-last maps, whose rows are positions.
template <class S>
KD_FN void pyramid_channels(const PyramidParams& p, int64_t task, S* room) {
  using V = typename VectorOf<S>::V;
  const Channels channels(p, task);
  const int64_t b = channels.sample, first = channels.first;
  const int n = channels.count;
  const int64_t grid = p.y.segments * p.x.segments * n;
  S *segments = room, *field = segments + grid;
  for (int64_t i = 0; i < grid; i++) segments[i] = 0;
  // Along one line of the map after the other.
  const auto for_positions = [&](const auto& body, const auto& after_line) {
    for (int64_t y = 0; y < p.y.segments; y++)
      for (int64_t i = p.y.edge[y]; i < p.y.edge[y + 1]; i++) {
        for (int64_t x = 0; x < p.x.segments; x++)
          for (int64_t j = p.x.edge[x]; j < p.x.edge[x + 1]; j++)
            body((b * p.y.size + i) * p.x.size + j, (y * p.x.segments + x) * n);
        after_line();
      }
  };
  double loss = 0;
  V squares{};
  for_positions(
      [&](int64_t row, int64_t segment) {
        S* to = segments + segment;
        Sides<S>(p, row).differences(first, n, [&](int i, auto w, V d) {
          squares += d * d;
          write<V>(to + i, w, read<V>(to + i, w, S(0)) + d);
        });
      },
      [&] { loss += sum(squares), squares = V{}; });
  p.task_loss[task] = p.weight[0] * loss + pool(p, segments, field, n);
  if (!p.grad_student.data && !p.grad_teacher.data) return;
  for_positions(
      [&](int64_t row, int64_t segment) {
        Sides<S>(p, row).emit(first, n, (S)(2 * p.weight[0]), field + segment);
      },
      [] {});
}
