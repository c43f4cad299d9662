// SPDX-License-Identifier: Apache-2.0
// Rows in global memory, and a thread's part of them: `width` neighbouring classes at a time, which
// one instruction reads or writes where they lie aligned. In double, which is rare, one.

template <class S> constexpr int width = sizeof(S) == 4 ? 4 : 1;

KD_DEVICE float widened(DType dtype, uint16_t bits) {
  return dtype == DType::bfloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
}
template <class T, class From>
KD_DEVICE T bits_as(const From& from) {
  static_assert(sizeof(T) == sizeof(From));
  T to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
KD_DEVICE Pack<uint32_t, 4> padded(Pack<uint32_t, 2> words) {
  return {{words.values[0], words.values[1], 0, 0}};
}
// Four logits, from as many words or from two of two halves each.
KD_DEVICE void widen(DType dtype, Pack<uint32_t, 4> words, float (&z)[4]) {
  if (dtype == DType::float32) {
    for (int j = 0; j < 4; j++) z[j] = as_number<float>(words.values[j]);
  } else if (dtype == DType::bfloat16) {
    for (int j = 0; j < 4; j += 2) {
      z[j] = as_number<float>(words.values[j / 2] << 16);
      z[j + 1] = as_number<float>(words.values[j / 2] & 0xffff0000u);
    }
  } else {
    for (int j = 0; j < 4; j++)
      z[j] = to_float(float16{(uint16_t)(words.values[j / 2] >> 16 * (j % 2))});
  }
}

template <class S>
struct RowReader {
  Rows rows;
  int64_t offset;

  KD_DEVICE S at(int64_t i) const {
    const int64_t k = offset + i * rows.class_stride;
    if (rows.dtype == DType::float32) return (S)((const float*)rows.data)[k];
    if (rows.dtype == DType::float64) return (S)((const double*)rows.data)[k];
    return (S)widened(rows.dtype, ((const uint16_t*)rows.data)[k]);
  }
};

// Of a row's first class, past 16 aligned bytes. Chunks of `width` classes are counted from there.
KD_DEVICE int lead_of(const RowReader<float>& row) {
  if (row.rows.class_stride != 1) return 0;
  const int size = size_of(row.rows.dtype);
  return (int)((uintptr_t)((const char*)row.rows.data + row.offset * size) % 16) / size;
}
KD_DEVICE int lead_of(const RowReader<double>&) { return 0; }

// Consecutive classes of a row, `n` from `from` on. Chunk i begins with the class 4 i - lead of them.
struct Span {
  int from, n, lead, chunks;

  KD_DEVICE Span(int from, int n, int lead)
      : from(from), n(n), lead(lead), chunks((n + lead + 3) / 4) {}
  KD_DEVICE Span(const RowReader<float>& row, int64_t classes)  // all of them
      : Span(0, (int)classes, lead_of(row)) {}

  // Whether all classes of a chunk are there.
  KD_DEVICE bool whole(int i) const { return 4 * i >= lead && 4 * i + 4 - lead <= n; }
  // Chunks [begin, end) of a row, as far as it has them.
  KD_DEVICE Span part(int begin, int end) const {
    if (begin >= chunks) return {0, 0, 0};
    const int first = 4 * begin > lead ? 4 * begin - lead : 0, past = 4 * end - lead;
    return {first, (past < n ? past : n) - first, begin ? 0 : lead};
  }
};

// Whether every fourth of a row's classes from `at` on begins a pack.
KD_DEVICE bool aligned_packs(const Rows& rows, int64_t at) {
  return rows.class_stride == 1 && ((uintptr_t)rows.data / size_of(rows.dtype) + at) % 4 == 0;
}

template <class S>
KD_DEVICE void write_element(const Rows& rows, int64_t at, S value) {
  switch (rows.dtype) {
    case DType::float32: ((float*)rows.data)[at] = (float)value; break;
    case DType::float64: ((double*)rows.data)[at] = value; break;
    case DType::bfloat16: ((bfloat16*)rows.data)[at] = from_float<bfloat16>((float)value); break;
    default: ((float16*)rows.data)[at] = from_float<float16>((float)value);
  }
}

template <class T>
KD_DEVICE void store_halves(const Rows& rows, int64_t at, const float (&z)[4]) {
  Pack<T, 4> pack;
  for (int j = 0; j < 4; j++) pack.values[j] = from_float<T>(z[j]);
  store_once((T*)rows.data + at, pack);
}

// Classes [first, first + width) of `classes`; `packed`: they are there, and lie aligned.
template <class S>
KD_DEVICE void write(const Rows& rows, int64_t row_at, int64_t first, int64_t classes, bool packed,
                     const S (&z)[width<S>]) {
  if constexpr (sizeof(S) == 4) {
    const int64_t at = row_at + first;
    if (packed) {
      if (rows.dtype == DType::bfloat16) store_halves<bfloat16>(rows, at, z);
      else if (rows.dtype == DType::float16) store_halves<float16>(rows, at, z);
      else store_once((float*)rows.data + at, Pack<float, 4>{{z[0], z[1], z[2], z[3]}});
      return;
    }
  }
  for (int j = 0; j < width<S>; j++) {
    const int64_t i = first + j;
    if (i >= 0 && i < classes) write_element(rows, row_at + i * rows.class_stride, z[j]);
  }
}
