// SPDX-License-Identifier: Apache-2.0
// Rows of any dtype and stride, seen block by block as contiguous float or double. Included inside
// an ISA level's namespace. What is already that is read where it lies, and written in place.

#include "../half.h"

constexpr int block = 1024;  // elements; a few such buffers stay in L1

template <class S>
constexpr DType dtype_of = sizeof(S) == 4 ? DType::float32 : DType::float64;

template <class S>
struct RowReader {
  const Rows& rows;
  int64_t offset;

  // Elements [first, first + n) of the row, in `scratch` if they have to be converted.
  const S* get(int64_t first, int n, S* scratch) const {
    const int64_t at = offset + first * rows.class_stride, stride = rows.class_stride;
    if (rows.dtype == dtype_of<S> && stride == 1) return (const S*)rows.data + at;
    switch (rows.dtype) {
      case DType::float32: convert((const float*)rows.data + at, stride, n, scratch); break;
      case DType::float64: convert((const double*)rows.data + at, stride, n, scratch); break;
      case DType::bfloat16:
        widen<from_bfloat16>((const uint16_t*)rows.data + at, stride, n, scratch);
        break;
      case DType::float16:
        widen<from_float16>((const uint16_t*)rows.data + at, stride, n, scratch);
        break;
    }
    return scratch;
  }
  S at(int64_t i) const {
    S z;
    return *get(i, 1, &z);
  }
  template <class T>
  static void convert(const T* p, int64_t stride, int n, S* out) {
    for (int i = 0; i < n; i++) out[i] = (S)p[i * stride];
  }
  template <float (*from)(uint16_t)>
  static void widen(const uint16_t* p, int64_t stride, int n, S* out) {
    if (stride == 1) {  // a loop of its own, since only this one vectorises
      for (int i = 0; i < n; i++) out[i] = (S)from(p[i]);
    } else {
      for (int i = 0; i < n; i++) out[i] = (S)from(p[i * stride]);
    }
  }
};

template <class S>
struct RowWriter {
  const Rows& rows;
  int64_t offset;
  bool direct;  // the kernel's writes go straight to the row

  RowWriter(const Rows& rows, int64_t r, bool aliases_input)
      : rows(rows), offset(rows.data ? row_offset(rows, r) : 0),
        direct(rows.dtype == dtype_of<S> && rows.class_stride == 1 && !aliases_input) {}
  bool wanted() const { return rows.data != nullptr; }
  S* at(int64_t first, S* scratch) const {
    return direct ? (S*)rows.data + offset + first : scratch;
  }
  void flush(int64_t first, int n, const S* from) const {
    if (direct) return;
    const int64_t at = offset + first * rows.class_stride, stride = rows.class_stride;
    switch (rows.dtype) {
      case DType::float32:
        for (int i = 0; i < n; i++) ((float*)rows.data)[at + i * stride] = (float)from[i];
        break;
      case DType::float64:
        for (int i = 0; i < n; i++) ((double*)rows.data)[at + i * stride] = from[i];
        break;
      case DType::bfloat16: narrow<to_bfloat16>((uint16_t*)rows.data + at, stride, n, from); break;
      case DType::float16: narrow<to_float16>((uint16_t*)rows.data + at, stride, n, from); break;
    }
  }
  template <uint16_t (*to)(float)>
  static void narrow(uint16_t* p, int64_t stride, int n, const S* from) {
    if (stride == 1) {
      for (int i = 0; i < n; i++) p[i] = to((float)from[i]);
    } else {
      for (int i = 0; i < n; i++) p[i * stride] = to((float)from[i]);
    }
  }
  void zero(int64_t classes) const {
    if (!wanted()) return;
    const S zeros[block] = {};
    for (int64_t i = 0; i < classes; i += block) {
      const int n = classes - i < block ? (int)(classes - i) : block;
      if (direct) __builtin_memset(at(i, nullptr), 0, n * sizeof(S));
      else flush(i, n, zeros);
    }
  }
};
