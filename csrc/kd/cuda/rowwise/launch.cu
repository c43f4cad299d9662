// SPDX-License-Identifier: Apache-2.0
// How the rows of a call are spread over a device.
#include <stdexcept>

#include "kernel.h"

namespace kd::cuda {

#define KD_DECLARE(name, K)                           \
  namespace name {                                    \
  int64_t resident(const RowwiseCall& p);             \
  void rowwise(const RowwiseCall& p, void* stream);   \
  }
KD_DIVERGENCES(KD_DECLARE)
#undef KD_DECLARE

namespace {

constexpr int64_t most_classes = (int64_t)1 << 30;  // an int counts those of a row

KD_KERNEL(most_threads, 1) void prepare(KD_PARAM RowwiseCall p) {
  SharedMemory memory = shared_memory();
  Group group(false, 1, memory.take<double>(Group::shared_numbers(most_threads, 1)));
  double count[1] = {p.count ? count_rows(p, group.index, group.count) : 0};
  group.all_reduce<1, 0>(count);
  if (!group.leads()) return;
  if (p.count) *p.count = (int64_t)count[0];
  *p.finished = 0;
}

// A row's slots in each block of a cluster of so many; of 0 chunks none.
void spread(RowwiseCall& p, int64_t chunks, int cluster) {
  p.cluster = cluster;
  p.rank_chunks = (int)((chunks + cluster - 1) / cluster + 3) / 4 * 4;  // 0 of 0
  p.slot_chunks = p.rank_chunks < limits.slot_chunks ? p.rank_chunks : limits.slot_chunks;
  p.slots = chunks ? (p.rank_chunks + p.slot_chunks - 1) / p.slot_chunks : 0;
  SharedMemory memory;
  memory.take<double>(Group::shared_numbers(p.threads, cluster));
  SlotMemory(p, memory);
  p.shared_bytes = memory.bytes();
}

// Blocks that the device holds at once. With more, some would begin when others have done all.
int64_t resident(const RowwiseCall& p) {
  switch (p.kind) {
#define KD_CASE(name, K) \
  case Kind::name: return name::resident(p);
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
    default: return p.cluster;
  }
}

}  // namespace

void plan(RowwiseCall& p) {
  const Properties& device = properties();
  const bool packed = p.student.class_stride == 1 && p.teacher.class_stride == 1;
  const Scope scope = scope_of(p);
  const int64_t seen = p.width ? p.width : p.classes;
  const int64_t chunks = (seen + 10) / 4;  // of 4 from up to 7 classes before the first
  const int64_t warps = (chunks + held_chunks * warp_threads - 1) / (held_chunks * warp_threads);
  p.one_warp = p.classes <= limits.warp;
  p.narrow = scope != Scope::any && !p.in_double() && p.classes <= limits.narrow &&
           warps * warp_threads <= (p.one_warp ? warp_threads : limits.threads);
  p.threads = p.one_warp ? limits.warps * warp_threads
              : p.narrow ? (int)warps * warp_threads
                         : limits.threads;
  spread(p, 0, 1);
  p.double_bytes = p.shared_bytes + 16;  // and whether a block is the last
  if (device.capability >= 90 && packed && !p.in_double() && seen > limits.narrow) {
    // As many blocks a multiprocessor as its registers hold, or as many as it takes.
    for (int cluster = 1; cluster <= 8; cluster *= 2) {
      spread(p, chunks, cluster);
      if (device.has_shared(at_once(scope, p.narrow), p.shared_bytes)) break;
    }
    if (!device.has_shared(1, p.shared_bytes) || !resident(p)) spread(p, 0, 1);
  }
  const int64_t groups_a_block = p.one_warp ? p.threads / warp_threads : 1;
  const int64_t blocks = (p.rows + groups_a_block - 1) / groups_a_block;
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b > 0 ? b : 1; };
  p.blocks = at_most(blocks, resident(p) / p.cluster) * p.cluster;
  p.double_blocks = at_most(blocks, device.multiprocessors *
                                        (p.in_double() ? limits.double_blocks : limits.rare_blocks));
  p.groups = p.blocks / p.cluster * groups_a_block;
  p.double_groups = p.double_blocks * groups_a_block;
}

void rowwise(const RowwiseCall& call, void* stream) {
  RowwiseCall p = call;
  if (!belongs(p.target, p.kind))
    throw std::runtime_error("kdkernels: no loss has this target with this divergence");
  if (p.classes >= most_classes) throw std::runtime_error("kdkernels: too many classes for CUDA");
  if (!p.rows) return;
  if (p.rows <= limits.few_rows || !p.counted) p.count = nullptr;
  if (p.count || p.in_double()) {
    SharedMemory memory;
    memory.take<double>(Group::shared_numbers(most_threads, 1));
    launch(prepare, {"rowwise, prepare", 1, most_threads, 1, memory.bytes(), stream}, p);
  }
  switch (p.kind) {
#define KD_CASE(name, K) \
  case Kind::name: return name::rowwise(p, stream);
    KD_DIVERGENCES(KD_CASE)
#undef KD_CASE
    default: break;
  }
}

}  // namespace kd::cuda
