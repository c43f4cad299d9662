// SPDX-License-Identifier: Apache-2.0
// A row pair in shared memory, spread over the blocks of a cluster, so that it is read from device
// memory once. A block's part comes in slots by bulk copies, each with a barrier: the first sweep
// works on those that have landed, and as soon as the last sweep is through with one, that of the
// block's next row is on its way into it.
//
// Bulk copies take whole and aligned 16 bytes: a slot keeps its classes at the distance from there
// that they have in memory, and a warp copies what is before the first and behind the last.

// The part of a side that a slot holds: n classes, of which head and tail are copied by threads.
struct Piece {
  const char* from;
  int size, n, shift, head, body;

  KD_DEVICE Piece(const RowReader<float>& side, const Span& span)
      : size(size_of(side.rows.dtype)), n(span.n) {
    from = (const char*)side.rows.data + (side.offset + span.from) * size;
    const int unit = 16 / size;
    shift = (int)((uintptr_t)from % 16) / size;
    head = (unit - shift) % unit;
    if (head > n) head = n;
    body = (n - head) / unit * unit;
  }
  // Of the classes that threads copy, the k-th, 0 <= k < 16: up to 7 on either side.
  KD_DEVICE int edge(int k) const {
    const int i = k < 8 ? k : head + body + k - 8;
    return i < (k < 8 ? head : n) ? i : -1;
  }
  KD_DEVICE int at(int i) const { return (shift + i) * (size / 2); }  // in units of 2 bytes
};

struct Slots : SlotMemory {
  const RowwiseCall& p;
  int rank, parity = 0, refilled = 0;
  int64_t next = 0;  // the row that comes after the present one

  KD_DEVICE Slots(const RowwiseCall& p, int rank, SharedMemory& memory)
      : SlotMemory(p, memory), p(p), rank(rank) {
    if (thread_index() == 0) {
      for (int i = 0; i < p.slots; i++) full[i].init(1);
      fence_barriers();
    }
  }

  // What a slot holds of a row.
  KD_DEVICE Span span(int slot, const Span& row) const {
    const int first = rank * p.rank_chunks, begin = first + slot * p.slot_chunks;
    int end = begin + p.slot_chunks;
    if (end > first + p.rank_chunks) end = first + p.rank_chunks;
    return row.part(begin, end);
  }

  KD_DEVICE void fill(int slot, int64_t row) {
    if (warp_index() != 0) return;
    const RowReader<float> sides[2] = {student_of<float>(p, row), teacher_of<float>(p, row)};
    const Span part = span(slot, Span(sides[0], p.width ? p.width : p.classes));
    const Piece s(sides[0], part), t(sides[1], part);
    const Shared<uint16_t> to_s = student_slot(slot), to_t = teacher_slot(slot);
    const int lane = lane_index();
    if (lane < 16) copy_edge(s, s.edge(lane), to_s);
    else copy_edge(t, t.edge(lane - 16), to_t);
    fence_async();  // the next copy may land where these were written
    sync_warp();
    if (lane == 0) {
      full[slot].arrive_expecting(s.body * s.size + t.body * t.size);
      copy_body(s, to_s, slot);
      copy_body(t, to_t, slot);
    }
  }
  KD_DEVICE void wait(int slot) const { full[slot].wait(parity); }
  // By all threads, when they are through with a slot of this row.
  KD_DEVICE void refill(int slot) {
    refilled = slot + 1;
    if (next >= p.rows) return;
    sync_block();
    fill(slot, next);
  }
  KD_DEVICE void end_row() {
    for (int slot = refilled; slot < p.slots; slot++) refill(slot);
    refilled = 0, parity ^= 1;
  }

 private:
  KD_DEVICE static void copy_edge(const Piece& piece, int i, const Shared<uint16_t>& to) {
    if (i < 0) return;
    if (piece.size == 2) to[piece.at(i)] = ((const uint16_t*)piece.from)[i];
    else to.set_pack<2>(piece.at(i), load<2>((const uint16_t*)piece.from + 2 * i));
  }
  KD_DEVICE void copy_body(const Piece& piece, const Shared<uint16_t>& to, int slot) const {
    const int halves = piece.body * (piece.size / 2);
    if (halves)
      copy_async(to.slice(piece.at(piece.head), halves),
                 (const uint16_t*)(piece.from + piece.head * piece.size), halves, full[slot]);
  }
};
