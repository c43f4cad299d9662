// SPDX-License-Identifier: Apache-2.0
// Rows in global memory, and a thread's part of them: `width` neighbouring classes at a time, which
// one instruction reads or writes where they lie aligned. In double, which is rare, one.

template <class S> constexpr int width = sizeof(S) == 4 ? 4 : 1;

template <class S>
struct RowReader {
  Rows rows;
  int64_t offset;

  KD_DEVICE S at(int64_t i) const {
    const int64_t k = offset + i * rows.class_stride;
    switch (rows.dtype) {
      case DType::float32: return (S)((const float*)rows.data)[k];
      case DType::float64: return (S)((const double*)rows.data)[k];
      case DType::bfloat16: return (S)to_float(((const bfloat16*)rows.data)[k]);
      default: return (S)to_float(((const float16*)rows.data)[k]);
    }
  }
};

// Of a row's first class, past 16 aligned bytes. Chunks of `width` classes are counted from there.
KD_DEVICE int lead_of(const RowReader<float>& row) {
  if (row.rows.class_stride != 1) return 0;
  const int size = size_of(row.rows.dtype);
  return (int)((uintptr_t)((const char*)row.rows.data + row.offset * size) % 16) / size;
}
KD_DEVICE int lead_of(const RowReader<double>&) { return 0; }

KD_DEVICE void widen(DType dtype, Pack<uint16_t, 4> halves, float (&z)[4]) {
  for (int j = 0; j < 4; j++)
    z[j] = dtype == DType::bfloat16 ? to_float(bfloat16{halves.values[j]})
                                    : to_float(float16{halves.values[j]});
}

KD_DEVICE bool aligned_pack(const Rows& rows, int64_t at) {
  return rows.class_stride == 1 && ((uintptr_t)rows.data / size_of(rows.dtype) + at) % 4 == 0;
}

// Classes [first, first + width) of `classes`; what is outside is off.
KD_DEVICE void read(const RowReader<float>& from, int64_t first, int64_t classes, float (&z)[4]) {
  const int64_t at = from.offset + first;
  if (first >= 0 && first + 4 <= classes && aligned_pack(from.rows, at)) {
    if (from.rows.dtype == DType::float32) {
      const Pack<float, 4> pack = load<4>((const float*)from.rows.data + at);
      for (int j = 0; j < 4; j++) z[j] = pack.values[j];
    } else {
      widen(from.rows.dtype, load<4>((const uint16_t*)from.rows.data + at), z);
    }
    return;
  }
  for (int j = 0; j < 4; j++) {
    const int64_t i = first + j;
    z[j] = i >= 0 && i < classes ? from.at(i) : floor_of<float>;
  }
}
KD_DEVICE void read(const RowReader<double>& from, int64_t first, int64_t, double (&z)[1]) {
  z[0] = from.at(first);
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

template <class S>
KD_DEVICE void write(const Rows& rows, int64_t row_at, int64_t first, int64_t classes,
                     const S (&z)[width<S>]) {
  if constexpr (sizeof(S) == 4) {
    const int64_t at = row_at + first;
    if (first >= 0 && first + 4 <= classes && aligned_pack(rows, at)) {
      if (rows.dtype == DType::float32)
        store_once((float*)rows.data + at, Pack<float, 4>{{z[0], z[1], z[2], z[3]}});
      else if (rows.dtype == DType::bfloat16) store_halves<bfloat16>(rows, at, z);
      else store_halves<float16>(rows, at, z);
      return;
    }
  }
  for (int j = 0; j < width<S>; j++) {
    const int64_t i = first + j;
    if (i >= 0 && i < classes) write_element(rows, row_at + i * rows.class_stride, z[j]);
  }
}
