// SPDX-License-Identifier: Apache-2.0
// What the kernels of the single divergences (rowwise.h) and their launch share.
#pragma once
#include "../device.h"
#include "../group.h"
#include "../rowwise.h"

namespace kd::cuda {

constexpr int most_threads = 192;  // 168 registers each, at two blocks a multiprocessor
constexpr int held_chunks = 4;     // of 4 classes of each side, of a narrow row: 32 registers

// What a kernel is compiled for: what the compiler knows not to be asked for costs no registers.
enum class Scope {
  ordinary,  // the loss, the student's gradient and the row weight's
  target,    // the same of a loss that looks at its target
  any
};
inline Scope scope_of(const RowwiseCall& p) {
  if (p.standardize || p.width || p.parts || p.grad_teacher.data || p.slopes) return Scope::any;
  return p.target == Target::ordinary && p.target_weight == 0 ? Scope::ordinary : Scope::target;
}
// Blocks a multiprocessor that the registers have to suffice for. A target beside a row that is held
// takes some more than half of them.
constexpr int at_once(Scope scope, bool narrow) {
  return scope == Scope::any || (scope == Scope::target && narrow) ? 1 : 2;
}

KD_DEVICE void store_number(bool in_double, void* to, int64_t i, double value) {
  if (in_double) ((double*)to)[i] = value;
  else ((float*)to)[i] = (float)value;
}

// What the slots of slots.h take of a block's shared memory: of a side in units of 2 bytes, where a
// slot has room for the distance to 16 aligned bytes; and a barrier for each.
struct SlotMemory {
  int student_size, teacher_size;  // of one slot
  Shared<uint16_t> student, teacher;
  Barriers full;

  KD_BOTH static int halves(const RowwiseCall& p, const Rows& side) {
    return p.slot_chunks * 2 * size_of(side.dtype) + 8;
  }
  KD_BOTH SlotMemory(const RowwiseCall& p, SharedMemory& memory)
      : student_size(halves(p, p.student)),
        teacher_size(halves(p, looks_at_teacher(p) ? p.teacher : p.student)),
        student(memory.take<uint16_t>((p.slots ? p.slots : 1) * student_size)),
        teacher(memory.take<uint16_t>((p.slots ? p.slots : 1) * teacher_size)),
        full(memory.barriers(p.slots)) {}

  KD_DEVICE Shared<uint16_t> student_slot(int slot) const {
    return student.slice(slot * student_size, student_size);
  }
  KD_DEVICE Shared<uint16_t> teacher_slot(int slot) const {
    return teacher.slice(slot * teacher_size, teacher_size);
  }
};

// Rows that count, of those from `first` in steps of `step`.
KD_DEVICE double count_rows(const RowwiseCall& p, int64_t first, int64_t step) {
  int64_t n = 0;
  for (int64_t i = first; i < p.rows; i += step) n += row_counts(p, p.ignore_index, i);
  return (double)n;
}

// Whether all other blocks of the grid have come here. Every thread has to.
KD_DEVICE bool is_last_block(int* finished, const Shared<int>& last) {
  sync_block();
  if (thread_index() == 0) {
    fence_device();
    last[0] = atomic_add(finished, 1) == grid_blocks() - 1;
    fence_device();
  }
  sync_block();
  return last[0];
}

// The loss from what each group has left of it, in the order of the groups.
KD_DEVICE void add_up(const RowwiseCall& p, double factor, const Shared<double>& partial) {
  Group block(false, 1, partial);
  double sum[1] = {};
  for (int64_t i = (p.in_double() ? p.groups : 0) + block.index; i < p.groups + p.double_groups;
       i += block.count)
    sum[0] += p.partial[i];
  block.all_reduce<1, 0>(sum);
  if (block.leads()) store_number(p.in_double(), p.loss, 0, sum[0] * factor);
}

}  // namespace kd::cuda
