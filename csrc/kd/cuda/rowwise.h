// SPDX-License-Identifier: Apache-2.0
// The rowwise family on a GPU: a call, how it is laid out on the device, and its launch.
#pragma once
#include <stddef.h>

#include "../rowwise.h"

namespace kd::cuda {

// Where one way of working gives way to the next. No GPU has measured these: some are what registers
// hold, the others guesses.
struct RowwiseLimits {
  // Classes up to which a warp has a row, and up to which a row is in the registers of its warp or
  // block: 16 of a thread (held_chunks), less the 7 that may lie before the first.
  int64_t warp = 16 * 32 - 7, narrow = 16 * 192 - 7;
  int threads = 192;       // of a block that has a row: the registers of most_threads suffice for 2
  int warps = 4;           // of a block where each has a row: a few, so that the last rows spread
  int slot_chunks = 1024;  // of 4 classes, that one copy brings: 8 KiB, worth a barrier, and short
                           // enough for the first sweep to begin early
  // Rows that every group may count for itself: up to 128 flags a lane from L2, for a launch less.
  int64_t few_rows = 4096;
  // Blocks a multiprocessor of the kernel in double: several where it has all rows, to hide what it
  // waits for; where it has the rare row, as few as find it soon.
  int double_blocks = 8, rare_blocks = 2;
};
inline RowwiseLimits limits;

struct RowwiseCall : RowwiseParams {
  // By the caller. `factor` lacks the number of rows that count, by which it is divided if `counted`.
  bool counted = false;
  bool by_row = false;         // `loss` is (N,), not ()
  bool slopes = false;         // row_grads has the gradients to the temperatures
  void* loss = nullptr;        // as row_grads of double if a side is, else of float
  uint8_t* inexact = nullptr;  // (N,)
  double* partial = nullptr;   // (groups + double_groups,)
  int64_t* count = nullptr;    // (1,)
  int* finished = nullptr;     // (1,): blocks

  // By plan().
  int64_t blocks = 0, groups = 0, double_blocks = 0, double_groups = 0;
  int threads = 0, cluster = 1;
  bool one_warp = false;
  bool narrow = false;  // each thread has its part of a row in registers
  int slots = 0, slot_chunks = 0, rank_chunks = 0;  // of a row in shared memory, in each block
  size_t shared_bytes = 0, double_bytes = 0;

  KD_ANYWHERE bool in_double() const {
    return student.dtype == DType::float64 || teacher.dtype == DType::float64;
  }
};

// Whether a loss of the family has this divergence with this target: DKD forward KL, and NKD, ATS
// and WSLD the cross-entropy. There is no kernel for others.
KD_ANYWHERE constexpr bool belongs(Target target, Kind kind) {
  if (target == Target::ordinary) return true;
  return target == Target::decoupled ? kind == Kind::forward_kl : kind == Kind::cross_entropy;
}
void plan(RowwiseCall& call);
// On `stream`, a cudaStream_t, of the current device: two launches, and where there are many rows to
// be counted three.
void rowwise(const RowwiseCall& call, void* stream);

}  // namespace kd::cuda
