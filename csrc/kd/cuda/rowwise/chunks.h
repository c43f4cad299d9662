// SPDX-License-Identifier: Apache-2.0
// A row pair in a thread's hands: chunks of `width` neighbouring classes, from its registers, from
// slots of shared memory, or from where they lie. In fp32 a class that is off is -inf, in double the
// floor.

template <class S>
struct Chunk {
  int64_t first;
  bool whole;  // all of its classes are the row's
  S s[width<S>], t[width<S>];
};

// One side of a span, where it lies and in a slot. `aligned`: one instruction reads a whole chunk.
struct Direct {
  const RowReader<float>& row;
  int64_t start;  // of chunk 0
  bool aligned;

  KD_DEVICE Direct(const RowReader<float>& row, const Span& span)
      : row(row), start(row.offset + span.from - span.lead),
        aligned(aligned_packs(row.rows, start)) {}

  KD_DEVICE DType dtype() const { return row.rows.dtype; }
  KD_DEVICE float at(int k) const { return row.at(start - row.offset + k); }
  KD_DEVICE Pack<uint32_t, 4> words(int i) const {
    const int64_t at = start + 4 * (int64_t)i;
    if (dtype() == DType::float32) return load<4>((const uint32_t*)row.rows.data + at);
    return padded(load<2>((const uint32_t*)((const uint16_t*)row.rows.data + at)));
  }
};
struct Staged {
  const RowReader<float>& row;
  Shared<uint16_t> slot;
  int start;
  bool aligned;

  KD_DEVICE Staged(const RowReader<float>& row, const Span& span, const Shared<uint16_t>& slot)
      : row(row), slot(slot), start(Piece(row, span).shift - span.lead), aligned(start % 4 == 0) {}

  KD_DEVICE DType dtype() const { return row.rows.dtype; }
  KD_DEVICE float at(int k) const {
    if (dtype() == DType::float32) return bits_as<float>(slot.pack<2>(2 * (start + k)));
    return widened(dtype(), slot[start + k]);
  }
  KD_DEVICE Pack<uint32_t, 4> words(int i) const {
    if (dtype() == DType::float32) return bits_as<Pack<uint32_t, 4>>(slot.pack<8>(2 * (start + 4 * i)));
    return halves(i);
  }
  KD_DEVICE Pack<uint32_t, 4> halves(int i) const {
    return padded(bits_as<Pack<uint32_t, 2>>(slot.pack<4>(start + 4 * i)));
  }
};

// Chunk i; what is outside the span is off.
template <class From>
KD_DEVICE void read_parts(const From& from, const Span& span, int i, float (&z)[4]) {
  for (int j = 0; j < 4; j++) {
    const int k = 4 * i + j;
    z[j] = k >= span.lead && k < span.lead + span.n ? from.at(k) : -__builtin_inff();
  }
}
template <class From>
KD_DEVICE void read(const From& from, const Span& span, int i, float (&z)[4]) {
  if (from.aligned && span.whole(i)) widen(from.dtype(), from.words(i), z);
  else read_parts(from, span, i, z);
}

template <class S, class Body>
KD_DEVICE void visit(const Row<S>& r, Chunk<S>& c, const Body& body) {
  r.student.amend(c.first, c.s), r.teacher.amend(c.first, c.t);
  body(c);
}

// A narrow row's logits: all are on their way before the first is looked at.
KD_DEVICE void hold(const Group& group, const RowReader<float>& row, const Span& span,
                    float (&z)[held_chunks][4]) {
  const Direct from(row, span);
  Pack<uint32_t, 4> words[held_chunks];
  KD_UNROLL
  for (int k = 0; k < held_chunks; k++) {
    const int i = group.index + k * group.count;
    if (from.aligned && span.whole(i)) words[k] = from.words(i);
  }
  KD_UNROLL
  for (int k = 0; k < held_chunks; k++) {
    const int i = group.index + k * group.count;
    if (from.aligned && span.whole(i)) widen(from.dtype(), words[k], z[k]);
    else read_parts(from, span, i, z[k]);
  }
}
KD_DEVICE void hold(Row<float>& r) {
  const Span span(r.student.reader, r.classes);
  hold(r.group, r.student.reader, span, r.held_s);
  hold(r.group, r.teacher.reader, span, r.held_t);
  r.held = true;
}
template <class Body>
KD_DEVICE void for_held(const Row<float>& r, const Span& span, const Body& body) {
  KD_UNROLL
  for (int k = 0; k < held_chunks; k++) {
    const int i = r.group.index + k * r.group.count;
    if (i >= span.chunks) break;
    Chunk<float> c;
    c.first = 4 * i - span.lead, c.whole = span.whole(i);
    for (int j = 0; j < 4; j++) c.s[j] = r.held_s[k][j], c.t[j] = r.held_t[k][j];
    visit(r, c, body);
  }
}

// Of a row, or of the part of it that is in a slot, in which whole chunks of bfloat16 have a path
// with nothing to choose.
template <class Body>
KD_DEVICE void for_span(const Row<float>& r, const Span& span, int slot, const Body& body) {
  const Slots& slots = r.slots;
  const bool staged = slots.p.slots > 0;
  const Direct s(r.student.reader, span), t(r.teacher.reader, span);
  const Staged slot_s(r.student.reader, span, slots.student_slot(slot));
  const Staged slot_t(r.teacher.reader, span, slots.teacher_slot(slot));
  const bool plain = staged && slot_s.aligned && slot_t.aligned &&
                     slot_s.dtype() == DType::bfloat16 && slot_t.dtype() == DType::bfloat16;
  const int begin = (span.lead + 3) / 4, end = plain ? (span.n + span.lead) / 4 : begin;
  const int first = staged ? thread_index() : r.group.index;
  const int step = staged ? block_threads() : r.group.count;
  for (int i = first; i < span.chunks; i += step) {
    Chunk<float> c;
    c.first = span.from - span.lead + 4 * (int64_t)i;
    c.whole = span.whole(i);
    if (i >= begin && i < end) {
      c.whole = true;
      widen(DType::bfloat16, slot_s.halves(i), c.s), widen(DType::bfloat16, slot_t.halves(i), c.t);
    } else if (staged) {
      read(slot_s, span, i, c.s), read(slot_t, span, i, c.t);
    } else {
      read(s, span, i, c.s), read(t, span, i, c.t);
    }
    visit(r, c, body);
  }
}

// All chunks of this thread. `last`: of the row's sweeps.
template <bool last, class S, class Body>
KD_DEVICE void for_chunks(const Row<S>& r, const Body& body) {
  if constexpr (sizeof(S) == 8) {
    for (int64_t i = r.group.index; i < r.classes; i += r.group.count)
      body(Chunk<S>{i, true, {r.student.get(i)}, {r.teacher.get(i)}});
  } else {
    const Span row(r.student.reader, r.classes);
    if (r.held) return for_held(r, row, body);
    Slots& slots = r.slots;
    const bool staged = slots.p.slots > 0;
    for (int slot = 0; slot < (staged ? slots.p.slots : 1); slot++) {
      if (staged) slots.wait(slot);
      for_span(r, staged ? slots.span(slot, row) : row, slot, body);
      if (last && staged) slots.refill(slot);
    }
  }
}
