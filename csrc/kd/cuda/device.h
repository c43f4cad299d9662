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
//   cluster_rank() cluster_size()       blocks of a cluster have consecutive indices
//   sync_block() sync_warp() sync_cluster() = cluster_arrive() + cluster_wait()
//   shuffle(v, lane) shuffle_xor(v, mask) shuffle_down(v, by)   32-, 64-bit v; of whole warps:
//   vote_any(p) vote_all(p) vote_bits(p)                        every lane has to call them
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
//   b[i].arrive()  b[i].arrive_expecting(bytes)                 one of the phase's `count` arrivals
//   remote(b[i], rank).arrive()         the same at another block's barrier
//   b[i].wait(parity)                   until the phase of that parity (0, 1, 0, ...) is complete
//   b[i].wait_cluster(parity)           the same where other blocks arrive or send
//   copy_async(a, from, n, b[i])        global to shared: 16-byte aligned, n elements of whole 16
//                                       bytes, which the barrier counts; issued by one thread
//   send_async(a, i, v, b[j], rank)     a[i] = v in another block, 4 or 8 bytes, counted there
//   fence_async()                       between own writes to shared memory and copy_async to there
//   copy16_async(a, from)               sm_80: 16 bytes, by each thread; commit_copies() ends a
//   commit_copies() wait_copies<N>()    group; waits for own groups but the last N, and no others
//
//   load<N>(p) load_once<N>(p)          Pack of N elements from N elements' alignment, up to 16
//   store(p, pack) store_once(p, pack)  bytes; once: the first to leave the caches
//   to_float(x) from_float<T>(f)        bfloat16 and float16 to nearest even; double as double
//   larger(a, b) smaller(a, b)          the number where one is NaN; larger_or_nan(a, b) and
//                                       smaller_or_nan(a, b) of floats NaN
//   exp2_approx(x) log2_approx(x)       relative error 2^-22, but log2 absolute between 1/2 and 2;
//   reciprocal_approx(x)                one unit in the last place. All flush subnormals to zero
//
// Clusters, barriers, copy_async and send_async need sm_90. For earlier devices they compile to
// nothing, and no thread may come to them there.
#pragma once
#include "types.h"

#ifdef KD_SIMT
#include "../../testing/simt/device.h"
#else
#include "nvidia.h"
#endif
