// SPDX-License-Identifier: Apache-2.0
// Attention transfer and factor transfer: a distance of normalised attention maps. With one channel
// and power 1, that of normalised samples.
//
// Fuses the power, the mean over channels, the normalisation, the distance and the gradients to both
// maps. A sample is read twice, the second time from L2 where it fits (262 kB are 64 channels of
// 32 x 32 in fp32), and its gradient written once: 12 bytes an element of the student, 4 of the
// teacher. Nothing but a sample's attention maps is kept. Included inside an ISA level's namespace.

template <class V>
KD_FN V raised(V x, int64_t power) {
  V result = x;
  for (int64_t i = 1; i < power; i++) result *= x;
  return result;
}

// The sum over positions of f(position, w), a vector of them.
template <class V, class F>
KD_FN double sum_over(int64_t positions, const F& f) {
  double total = 0;
  for_blocks(positions, [&](int64_t first, int n) {
    V sums{};
    sweep<V>(n, [&](int i, auto w) { sums += f(first + i, w); });
    total += sum(sums);
  });
  return total;
}

// In double, since squares of large attention are beyond fp32; in several chains, each of which waits
// for itself.
template <class S>
KD_FN double squares_of(const S* x, int64_t n) {
  constexpr int chains = 4, step = Lanes<vd>::count;
  alignas(64) double wide[block];
  vd sums[chains] = {};
  for_blocks(n, [&](int64_t first, int size) {
    const int padded = (size + chains * step - 1) / (chains * step) * chains * step;
    for (int i = 0; i < size; i++) wide[i] = x[first + i];
    for (int i = size; i < padded; i++) wide[i] = 0;
    for (int i = 0; i < padded; i += chains * step)
      for (int c = 0; c < chains; c++) {
        const vd v = load<vd>(wide + i + c * step);
        sums[c] += v * v;
      }
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// sum_c F^power of sample b, (P,); returns its Euclidean norm.
template <class S>
KD_FN double attention_of(const Maps& maps, int64_t b, int64_t power, S* out) {
  using V = typename VectorOf<S>::V;
  alignas(64) S scratch[block];
  const int64_t channels = maps.channels, positions = maps.positions;
  if (maps.channels_last) {
    for (int64_t p = 0; p < positions; p++) {
      const RowReader<S> row{maps.rows, (b * positions + p) * channels};
      V sums{};
      for_blocks(channels, [&](int64_t first, int n) {
        const S* f = row.get(first, n, scratch);
        sweep<V>(n, [&](int i, auto w) { sums += raised(read<V>(f + i, w, S(0)), power); });
      });
      out[p] = sum(sums);
    }
  } else {
    for_blocks(positions, [&](int64_t first, int n) {
      S* to = out + first;
      for (int64_t c = 0; c < channels; c++) {
        const RowReader<S> row{maps.rows, (b * channels + c) * positions};
        const S* f = row.get(first, n, scratch);
        sweep<V>(n, [&](int i, auto w) {
          const V x = raised(read<V>(f + i, w, S(0)), power);
          write<V>(to + i, w, c ? read<V>(to + i, w, S(0)) + x : x);
        });
      }
    });
  }
  return __builtin_sqrt(squares_of(out, positions));
}

// From d loss / d F^power's mean (P,) to the gradient of sample b.
template <class S>
KD_FN void emit_attention(const Maps& maps, const Maps& grad, int64_t b, int64_t power,
                           const S* of_mean) {
  using V = typename VectorOf<S>::V;
  alignas(64) S scratch[block], buffer[block];
  const int64_t channels = maps.channels, positions = maps.positions;
  const bool last = maps.channels_last;
  const S slope = S((double)power / channels);
  const int64_t rows = last ? positions : channels;
  for (int64_t r = b * rows; r < (b + 1) * rows; r++) {
    const RowReader<S> row{maps.rows, r * maps.rows.inner_stride};
    const RowWriter<S> writer(grad.rows, r, false);
    const S one = last ? of_mean[r - b * rows] * slope : slope;
    for_blocks(last ? channels : positions, [&](int64_t first, int n) {
      const S* f = row.get(first, n, scratch);
      S* to = writer.at(first, buffer);
      sweep<V>(n, [&](int i, auto w) {
        const V x = read<V>(f + i, w, S(0));
        V g = power > 1 ? raised(x, power - 1) * one : all<V>(one);
        if (!last) g *= read<V>(of_mean + first + i, w, S(0));
        write<V>(to + i, w, g);
      });
      writer.flush(first, n, to);
    });
  }
}

// `maps`: room for 4 maps of P positions.
template <class S>
KD_FN void attention_sample(const SpatialAttentionParams& p, int64_t b, S* maps) {
  constexpr double eps = 1e-12;
  const int64_t positions = p.student.positions;
  S* const a[2] = {maps, maps + positions};
  S* const g[2] = {maps + 2 * positions, maps + 3 * positions};
  const Maps* const given[2] = {&p.student, &p.teacher};
  const Maps* const grads[2] = {&p.grad_student, &p.grad_teacher};
  double norm[2];
  S rate[2];  // from the sums to the normalised means
  for (int side = 0; side < 2; side++) {
    const double mean = 1.0 / given[side]->channels;
    norm[side] = mean * attention_of(*given[side], b, p.power, a[side]);
    rate[side] = S(mean / (norm[side] > eps ? norm[side] : eps));
  }
  using V = typename VectorOf<S>::V;
  double loss = sum_over<V>(positions, [&](int64_t i, auto w) {
    const V s = read<V>(a[0] + i, w, S(0)) * rate[0], t = read<V>(a[1] + i, w, S(0)) * rate[1];
    write<V>(a[0] + i, w, s), write<V>(a[1] + i, w, t);
    const V d = s - t;
    return p.distance == absolute ? magnitude(d) : d * d;
  });
  if (p.distance == norm_of_it) loss = __builtin_sqrt(loss);
  p.sample_loss[b] = loss;

  const double unit =
      p.factor * (p.distance == squared ? 2 : p.distance == absolute ? 1 : loss > 0 ? 1 / loss : 0);
  for (int side = 0; side < 2; side++) {
    if (!grads[side]->rows.data) continue;
    const double sign = side ? -unit : unit;
    const auto to_a = [&](int64_t i, auto w) {
      const V d = read<V>(a[0] + i, w, S(0)) - read<V>(a[1] + i, w, S(0));
      const V zero{}, one = all<V>(S(1));
      const V step = select(d > zero, one, select(d < zero, -one, zero));
      return (p.distance == absolute ? step : d) * S(sign);
    };
    // Of that gradient, on a: normalising takes it away.
    const double on_a = sum_over<V>(positions, [&](int64_t i, auto w) {
      return to_a(i, w) * read<V>(a[side] + i, w, S(0));
    });
    const bool clamped = !(norm[side] > eps);
    const S along = S(clamped ? 0 : on_a);
    const S inverse = S(norm[side] == 0 ? 0 : 1 / (clamped ? eps : norm[side]));
    for_blocks(positions, [&](int64_t first, int n) {
      sweep<V>(n, [&](int k, auto w) {
        const int64_t i = first + k;
        const V own = read<V>(a[side] + i, w, S(0));
        write<V>(g[side] + i, w, (to_a(i, w) - along * own) * inverse);
      });
    });
    emit_attention(*given[side], *grads[side], b, p.power, g[side]);
  }
}
