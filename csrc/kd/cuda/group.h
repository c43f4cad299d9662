// SPDX-License-Identifier: Apache-2.0
// The threads that work on a row together: a warp, a block, or the blocks of a cluster.
#pragma once
#include "device.h"

namespace kd::cuda {

struct Group {
  static constexpr int most = 9;  // numbers that are reduced at once

  bool one_warp;
  int warps, blocks;        // of a block; of the row
  int rank;                 // of this block among those
  int index, count;         // of this thread among all of them
  Shared<double> partial;   // two buffers of `most` from each warp of each block
  int turn = 0;

  KD_BOTH static int shared_numbers(int threads, int blocks) {
    return 2 * most * (threads / warp_threads) * blocks;
  }

  KD_DEVICE Group(bool one_warp, int blocks, Shared<double> partial)
      : one_warp(one_warp), warps(block_threads() / warp_threads), blocks(blocks),
        rank(blocks > 1 ? cluster_rank() : 0),
        index(one_warp ? lane_index() : rank * block_threads() + thread_index()),
        count(one_warp ? warp_threads : blocks * block_threads()), partial(partial) {}

  KD_DEVICE bool leads() const { return index == 0; }

  KD_DEVICE void sync() const {
    if (one_warp) sync_warp();
    else if (blocks > 1) sync_cluster();
    else sync_block();
  }

  // Replaces the first `sums` numbers by their sums over the group and the others by the largest,
  // in all threads, in an order that depends on the group alone.
  template <int sums, int maxima>
  KD_DEVICE void all_reduce(double (&v)[sums + maxima]) {
    constexpr int n = sums + maxima;
    static_assert(n <= most);
    over_warp<sums>(v);
    if (one_warp) return;
    const int entries = warps * blocks;
    const Shared<double> here = partial.slice(turn * most * entries, most * entries);
    turn ^= 1;  // who is late may still be reading the other
    if (lane_index() < blocks) {
      const Shared<double> there = blocks > 1 ? remote(here, lane_index()) : here;
      const int entry = rank * warps + warp_index();
      for (int i = 0; i < n; i++) there[entry * n + i] = v[i];
    }
    if (blocks > 1) sync_cluster();
    else sync_block();
    for (int i = 0; i < n; i++) v[i] = i < sums ? 0 : -1e308;
    for (int entry = lane_index(); entry < entries; entry += warp_threads)
      for (int i = 0; i < n; i++) v[i] = joined(i < sums, v[i], here[entry * n + i]);
    over_warp<sums>(v);
  }

 private:
  KD_DEVICE static double joined(bool add, double a, double b) {
    return add ? a + b : a > b ? a : b;
  }
  template <int sums, int n>
  KD_DEVICE static void over_warp(double (&v)[n]) {
    for (int mask = warp_threads / 2; mask; mask /= 2)
      for (int i = 0; i < n; i++) v[i] = joined(i < sums, v[i], shuffle_xor(v[i], mask));
  }
};

}  // namespace kd::cuda
