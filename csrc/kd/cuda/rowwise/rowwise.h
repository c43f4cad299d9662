// SPDX-License-Identifier: Apache-2.0
// Row-wise softmax divergences, cross-entropy, and their gradients, fused; compiled once for each
// divergence, KD_KIND, and of each for ordinary calls and for all others (Scope). A narrow row is a
// warp's or a block's, and in their registers; a wide one is that of a cluster whose shared memory holds
// it (slots.h): every logit is read from device memory once and every gradient written once, 6 bytes a
// class in bf16 and 12 in fp32; with the teacher's gradient 8 and 16. Wide rows that are strided, too
// wide for the largest cluster, or on a device without clusters, are read twice, 10 bytes in bf16;
// once more, 4 bytes, for divergences whose gradients are centred, which takes the sums of what the
// normalisers give, and where the sides are so close that they are compared class by class. Calls of
// Scope::any have no kernel for narrow rows: they read them again from the cache.
//
// The steps are the CPU kernel's, and so is what they come to (kd/rowwise): maxima and sums, for some
// divergences the sums that centre the gradients, the gradients. Kernels for narrow and for wide rows
// take them in fp32, and one in double for the rows that this cannot hold, each sweep a read; its last
// block adds up the loss.
#include "kernel.h"

namespace kd::cuda {
namespace KD_KIND {
#include "../scalar.h"
#include "../../divergence.h"

template <Kind> struct DivergenceOf;
#define KD_DIVERGENCE_OF(name, K) template <> struct DivergenceOf<Kind::name> { using type = K; };
KD_DIVERGENCES(KD_DIVERGENCE_OF)
using Divergence = DivergenceOf<Kind::KD_KIND>::type;
#define KD_KINDS(X) X(KD_KIND, Divergence)

#include "rows.h"
#include "side.h"
#include "../../rowwise/finish.h"
#include "slots.h"
#include "chunks.h"
#include "sweeps.h"
#include "cross_entropy.h"
#include "emit.h"

template <class S>
KD_DEVICE bool wants_slopes(const Row<S>& r) {
  return static_cast<const RowwiseCall&>(r.p).slopes;
}
template <class S>
KD_DEVICE void store_loss(const Row<S>& r, double value) {
  r.total += value;
  const auto& p = static_cast<const RowwiseCall&>(r.p);
  if (p.by_row && r.group.leads()) store_number(p.in_double(), p.loss, r.index, value);
}
template <class S>
KD_DEVICE void store_row_grad(const Row<S>& r, int which, double value) {
  const auto& p = static_cast<const RowwiseCall&>(r.p);
  if (r.group.leads()) store_number(p.in_double(), p.row_grads, which * p.rows + r.index, value);
}

// The call, in which the compiler sees what it does not ask for.
template <Scope scope>
KD_DEVICE RowwiseCall known(const RowwiseCall& given) {
  RowwiseCall p = given;
  p.kind = Kind::KD_KIND;
  if (scope == Scope::ordinary) p.target_weight = 0;
  if (scope == Scope::ordinary || !belongs(p.target, Kind::KD_KIND)) p.target = Target::ordinary;
  if (scope == Scope::any) return p;
  p.standardize = 0, p.first = p.width = p.teacher_first = 0, p.parts = p.slopes = false;
  p.grad_teacher = {};
  return p;
}

KD_DEVICE Group group_of(const RowwiseCall& p, int cluster, SharedMemory& memory) {
  return Group(p.one_warp, cluster, memory.take<double>(Group::shared_numbers(p.threads, cluster)));
}
// Among all groups of the grid.
KD_DEVICE int64_t number_of(const Group& group) {
  return group.one_warp ? (int64_t)block_index() * group.warps + warp_index()
                        : block_index() / group.blocks;
}
KD_DEVICE double factor_of(const RowwiseCall& p, Group& group) {
  if (!p.counted) return p.factor;
  double count[1] = {p.count ? 0 : count_rows(p, group.index, group.count)};
  if (p.count) count[0] = (double)*p.count;
  else group.all_reduce<1, 0>(count);
  return p.factor / (count[0] > 1 ? count[0] : 1);
}

KD_DEVICE void clear(const Rows& grad, int64_t row, int64_t classes, const Group& group) {
  if (!grad.data) return;
  const int64_t at = row_offset(grad, row);
  for (int64_t i = group.index; i < classes; i += group.count)
    write_element(grad, at + i * grad.class_stride, 0.f);
}

// The first row that counts, from `row` in steps of `step`; those before it have no gradients.
KD_DEVICE int64_t skip_rows(const RowwiseCall& p, const Group& group, int64_t row, int64_t step) {
  for (; row < p.rows && !row_counts(p, p.ignore_index, row); row += step) {
    clear(p.grad_student, row, p.classes, group);
    clear(p.grad_teacher, row, p.teacher_classes, group);
    if (!group.leads()) continue;
    p.inexact[row] = 0;
    if (p.by_row) store_number(p.in_double(), p.loss, row, 0);
    for (int k = 0; p.row_grads && k < (p.parts ? 6 : 4); k++)
      store_number(p.in_double(), p.row_grads, k * p.rows + row, 0);
  }
  return row;
}

// The first row that is marked as inexact, likewise; each lane looks at one of the next rows.
KD_DEVICE int64_t next_inexact(const RowwiseCall& p, int64_t row, int64_t step) {
  for (; row < p.rows; row += warp_threads * step) {
    const int64_t own = row + lane_index() * step;
    uint32_t marked = vote_bits(own < p.rows && p.inexact[own]);
    if (!marked) continue;
    for (; !(marked & 1); marked >>= 1) row += step;
    break;
  }
  return row;
}

// `narrow`: each thread has its part of a row in registers.
template <Scope scope, bool narrow>
KD_KERNEL(most_threads, at_once(scope, narrow)) void in_single(KD_PARAM RowwiseCall given) {
  RowwiseCall p = known<scope>(given);
  if (narrow) p.cluster = 1, p.slots = p.slot_chunks = 0;
  else if (scope != Scope::any) p.one_warp = false;
  SharedMemory memory = shared_memory();
  Group group = group_of(p, p.cluster, memory);
  Slots slots(p, group.rank, memory);
  const bool staged = p.slots > 0;
  if (staged) group.sync();  // the barriers are there, and the cluster's other blocks
  const int64_t own = number_of(group);
  int64_t row = skip_rows(p, group, own, p.groups);
  if (staged && row < p.rows)
    for (int slot = 0; slot < p.slots; slot++) slots.fill(slot, row);
  const double factor = factor_of(p, group);
  double total = 0;
  if (block_index() == 0 && thread_index() == 0) *p.finished = 0;  // for the kernel after this one
  while (row < p.rows) {
    slots.next = skip_rows(p, group, row + p.groups, p.groups);
    Row<float> r(p, row, factor, group, slots, total);
    const double tau_s = get(p.tau_s, row), tau_t = get(p.tau_t, row);
    if (narrow) hold(r);
    start(r, tau_s, tau_t);
    const bool exact = is_exact(r, exact_range_of(p), Divergence::zero_teacher);
    if (exact) finish_row<Exact>(r, tau_s, tau_t);
    if (group.leads()) p.inexact[row] = !exact;
    if (staged) slots.end_row();
    row = slots.next;
  }
  // Of `own`, which two registers would have to keep until here.
  if (!p.by_row && group.leads()) p.partial[row % p.groups] = total;
}

// Rows that are not marked as inexact have been done.
template <Scope scope>
KD_KERNEL(most_threads, 1) void in_double(KD_PARAM RowwiseCall given) {
  RowwiseCall p = known<scope>(given);
  p.slots = p.slot_chunks = 0;
  SharedMemory memory = shared_memory();
  Group group = group_of(p, 1, memory);
  const Shared<int> last = memory.take<int>(1);
  Slots slots(p, 0, memory);
  const int64_t own = number_of(group);
  const double factor = factor_of(p, group);
  double total = 0;
  const auto next = [&](int64_t row) {
    return p.in_double() ? skip_rows(p, group, row, p.double_groups)
                         : next_inexact(p, row, p.double_groups);
  };
  for (int64_t row = next(own); row < p.rows; row = next(row + p.double_groups)) {
    Row<double> r(p, row, factor, group, slots, total);
    const double tau_s = get(p.tau_s, row), tau_t = get(p.tau_t, row);
    start(r, tau_s, tau_t);
    finish_row<Robust>(r, tau_s, tau_t);
  }
  if (p.by_row) return;
  if (group.leads()) p.partial[p.groups + own] = total;
  if (is_last_block(p.finished, last)) add_up(p, factor, group.partial);
}

struct Kernels {
  void (*in_single)(RowwiseCall);
  void (*in_double)(RowwiseCall);
};
template <Scope scope>
Kernels kernels(bool narrow) {
  // In double targets and all else have one kernel.
  constexpr Scope rare = scope == Scope::ordinary ? scope : Scope::any;
  return {narrow ? in_single<scope, scope != Scope::any> : in_single<scope, false>, in_double<rare>};
}
Kernels kernels_of(const RowwiseCall& p) {
  constexpr Kind kind = Kind::KD_KIND;
  const Scope scope = scope_of(p);
  if constexpr (kind != Kind::cross_entropy)  // which every loss has with a target
    if (scope == Scope::ordinary) return kernels<Scope::ordinary>(p.narrow);
  if constexpr (kind == Kind::forward_kl || kind == Kind::cross_entropy)
    if (scope != Scope::any) return kernels<Scope::target>(p.narrow);
  return kernels<Scope::any>(p.narrow);
}

Launch launch_of(const RowwiseCall& p, int64_t blocks, void* stream) {
  return {"rowwise", blocks, p.threads, p.cluster, p.shared_bytes, stream};
}
int64_t resident(const RowwiseCall& p) {
  return cuda::resident(kernels_of(p).in_single, launch_of(p, p.cluster, nullptr));
}
void rowwise(const RowwiseCall& p, void* stream) {
  const Kernels own = kernels_of(p);
  if (!p.in_double()) launch(own.in_single, launch_of(p, p.blocks, stream), p);
  launch(own.in_double, {"rowwise in double", p.double_blocks, p.threads, 1, p.double_bytes, stream}, p);
}

}  // namespace KD_KIND
}  // namespace kd::cuda
