// SPDX-License-Identifier: Apache-2.0
// The rows of the score matrix that a task takes through all samples, the classes as queries and as
// keys. Included inside an ISA level's namespace.

constexpr int R = score_rows;

template <class S>
struct Buffer {
  S* const data;
  explicit Buffer(int64_t n)
      : data((S*)::operator new(n * sizeof(S), std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
};

// Rows [first, first + R) of a head's scores, in the unit of `exp_at_rate` and padded by classes
// that are off. Past the matrix's end the last row is repeated.
template <class S>
struct ScoreRows {
  const ClassAttention& p;
  const int64_t first, width, stride = p.classes + 1;
  Buffer<S> buffer{(R + 2) * width};
  S* const pairs = buffer.data;             // E
  S* const by_key = pairs + R * width;      // b
  S* const values = by_key + width;         // v
  S a, c[R], u;

  ScoreRows(const ClassAttention& p, int64_t first)
      : p(p), first(first), width(padded(p.classes)) {}
  int64_t row(int r) const { return first + r < p.classes ? first + r : p.classes - 1; }
  bool exists(int r) const { return first + r < p.classes; }

  void load_head(int64_t head) {
    const S unit = exp_rate<S>(1);
    const S* scores = (const S*)p.scores + head * stride * stride;
    const S* v = (const S*)p.values + head * stride;
    const S* b = scores + p.classes * stride;
    for (int64_t j = 0; j < width; j++) {
      const bool inside = j < p.classes;
      for (int r = 0; r < R; r++)
        pairs[r * width + j] = inside ? scores[row(r) * stride + j] * unit : floor_of<S>;
      by_key[j] = inside ? b[j] * unit : S(0);
      values[j] = inside ? v[j] : S(0);
    }
    a = b[p.classes], u = v[p.classes];
    for (int r = 0; r < R; r++) c[r] = scores[row(r) * stride + p.classes];
  }
};

// The R classes as queries, in one sample: a score is E + s_j slope + b_j s.
template <class S>
struct Queries {
  const S* soft;
  S s[R], slope[R];

  Queries(const ScoreRows<S>& rows, int64_t sample)
      : soft((const S*)rows.p.soft + sample * rows.width) {
    for (int r = 0; r < R; r++) {
      const S s_i = soft[rows.row(r)];
      s[r] = s_i <= floor_of<S> ? S(0) : s_i;  // NaN stays
      slope[r] = (rows.a * s[r] + rows.c[r]) * exp_rate<S>(1);
    }
  }
};

// A vector of classes as keys: their s, 0 where they are off.
template <bool some_off, class V, class S>
struct Keys {
  V s, b, barrier;
  KD_FN Keys(const S* soft, const S* by_key, int64_t j) : s(load<V>(soft + j)), b(load<V>(by_key + j)) {
    if constexpr (some_off) {
      const auto off = s <= all<V>(floor_of<S>);
      s = select(off, V{}, s), barrier = select(off, all<V>(floor_of<S>), V{});
    }
  }
  KD_FN V score(const S* pairs, S s_i, S slope) const {
    const V x = load<V>(pairs) + s * slope + b * s_i;
    if constexpr (some_off) return x + barrier;
    return x;
  }
};
