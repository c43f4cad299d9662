// SPDX-License-Identifier: Apache-2.0
// All that a CUDA kernel of ours uses of its hardware, under names of ours, so that the same source
// is compiled by nvcc for a GPU and by any C++ compiler (KD_SIMT) for the simulator in
// csrc/testing/simt, which finds what a GPU would answer with a wrong number now and then.
//
//   KD_KERNEL(threads, blocks) void f(KD_PARAM P p)   a kernel: at most `threads` a block, at least
//                           `blocks` resident on a multiprocessor
//   KD_DEVICE, KD_BOTH      functions on the device, on both sides
//   KD_UNROLL               before a loop whose steps are written out: they index registers
//   launch(f, Launch{...}, args...)     enqueues it, throws std::runtime_error; properties()
//   resident(f, Launch{...})            how many of its blocks the device holds at once, which for
//                                       clusters may be fewer than all multiprocessors have room for
//
//   thread_index() block_threads() block_index() grid_blocks() lane_index() warp_index()
//   cluster_rank()                      blocks of a cluster have consecutive indices
//   sync_block() sync_warp() sync_cluster()
//   shuffle_xor(v, mask) vote_bits(p)   32-, 64-bit v; of whole warps: every lane has to call them
//   fence_device() atomic_add(p, v)     writes before are seen before those after; returns what was
//
//   SharedMemory m = shared_memory();   what the launch asked for, handed out in the same order by
//   Shared<T> a = m.take<T>(n);         all threads; 16-byte aligned. On the host, SharedMemory()
//   Barriers b = m.barriers(n);         counts: m.bytes() is Launch::shared_bytes
//   a[i] a.slice(first, n) a.pack<N>(i) a.set_pack(i, p)        p: Pack<T, N>; i a multiple of N
//   remote(a, rank)                     the same in another block of the cluster, which must have
//                                       started (sync_cluster) and must not end before its last use
//
//   b[i].init(count)                    by one thread; then fence_barriers() by it, and a sync
//   b[i].arrive_expecting(bytes)        one of the phase's `count` arrivals
//   b[i].wait(parity)                   until the phase of that parity (0, 1, 0, ...) is complete
//   copy_async(a, from, n, b[i])        global to shared: 16-byte aligned, n elements of whole 16
//                                       bytes, which the barrier counts; issued by one thread
//   fence_async()                       between own writes to shared memory and copy_async to there
//
//   load<N>(p) store_once(p, pack)      Pack of N elements at N elements' alignment, up to 16 bytes;
//                                       once: the first to leave the caches
//   to_float(x) from_float<T>(f)        bfloat16 and float16, to nearest even
//   larger(a, b) smaller(a, b)          the number where one is NaN; larger_or_nan(a, b) and
//                                       smaller_or_nan(a, b) of floats NaN
//   exp2_approx(x)                      relative error 2^-22; subnormals are zero
//
// Clusters, barriers and copy_async need sm_90. For earlier devices they compile to nothing, and no
// thread may come to them there.
#pragma once
#include "types.h"

#ifdef KD_SIMT
#include "../../testing/simt/device.h"
#else
#include "nvidia.h"
#include "nvidia_host.h"
#endif
