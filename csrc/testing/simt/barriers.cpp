// SPDX-License-Identifier: Apache-2.0
// Where threads wait for one another, and for copies.
#include "machine.h"

namespace kd::cuda::simt {

void Thread::know(const Clock& clock) { known = machine->join(known, clock); }

Block& Machine::block(int rank) {
  if (rank < 0 || rank >= how_.cluster) fail("asks for block ", rank, " of the cluster");
  return blocks_[rank];
}

// True for the last of `size` threads, which then has to let the others go on.
bool Machine::meet(Meeting& meeting, size_t size, const char* what, Site site) {
  if (!meeting.empty()) {
    const Thread& other = *meeting[0];
    if (strcmp(other.waits, what) || !(other.site == site))
      fail("is in ", what, " at ", site, ", where ", other, " is in ", other.waits, " at ",
           other.site);
  }
  meeting.push_back(current_);
  if (meeting.size() == size) return true;
  pause(what, site);
  return false;
}

void Machine::synchronise(Meeting& meeting, Site site) {
  Gathering all;
  for (const Thread* t : meeting) all.add(t->known, t->now());
  const Clock clock = all.join();
  for (Thread* t : meeting) {
    t->known = clock;
    t->tick++;
    if (t != current_) wake(*t);
  }
  meeting.clear();
  current_->site = site;
}

void Machine::sync_block(Site site) {
  Meeting& all = current_->block->all;
  if (meet(all, how_.threads, "sync_block", site)) synchronise(all, site);
}

void Machine::sync_warp(Site site) {
  Meeting& warp = current_->block->warps[current_->index / warp_threads];
  if (meet(warp, warp_threads, "sync_warp", site)) synchronise(warp, site);
}

void Machine::sync_cluster(Site site) {
  if (meet(cluster_, threads_.size(), "sync_cluster", site)) synchronise(cluster_, site);
}

uint64_t Machine::exchange(const char* what, uint64_t word, int source, Site site) {
  Thread& t = *current_;
  t.word = word;
  t.source = source;
  Meeting& warp = t.block->warps[t.index / warp_threads];
  if (meet(warp, warp_threads, what, site)) {
    t.site = site;
    uint64_t words[warp_threads], votes = 0;
    for (const Thread* lane : warp) {
      const int i = lane->index % warp_threads;
      words[i] = lane->word;
      votes |= (uint64_t)(lane->word != 0) << i;
    }
    for (Thread* lane : warp) {
      lane->word = lane->source < 0 ? votes : words[lane->source];
      if (lane != &t) wake(*lane);
    }
    warp.clear();
  }
  return t.word;
}

// Barriers in shared memory.

std::ostream& operator<<(std::ostream& out, const BarrierState& b) {
  return out << "the barrier at byte " << b.offset << " of block " << b.block->index;
}

void Machine::init(size_t offset, int count) {
  Block& block = *current_->block;
  if (settings.properties.capability < 90) fail("initialises a barrier that this device has not");
  const auto [found, is_new] = block.barriers.try_emplace(offset);
  if (!is_new) fail("initialises a barrier twice");
  BarrierState& b = found->second;
  b.block = &block;
  b.offset = offset;
  b.initialised = current_->now();
  b.count = b.pending = count;
  b.agent = agents_++;
}

BarrierState& Machine::barrier(size_t offset) {
  Block& block = *current_->block;
  const auto found = block.barriers.find(offset);
  if (found == block.barriers.end()) fail("uses a barrier that has not been initialised");
  BarrierState& b = found->second;
  if (b.initialised.agent != current_->id) {
    if (!knows(current_->known, b.initialised)) fail("has not synchronised with the init of ", b);
    if (thread(b.initialised.agent)->fenced_barriers < b.initialised.tick)
      fail("uses ", b, ", which was initialised without fence_barriers");
  }
  return b;
}

void Machine::arrive(BarrierState& b, int bytes, Site site) {
  Thread& t = *current_;
  t.site = site;
  if (b.pending == 0) fail("arrives at ", b, ", which has had all arrivals of its phase");
  b.arriving.add(t.known, t.now());
  t.tick++;
  b.pending--;
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail(b, " can count up to 2^20 - 1 bytes");
  complete(b);
}

void Machine::complete(BarrierState& b) {
  if (b.pending || b.bytes > 0) return;
  if (b.bytes < 0) fail(b, " has received ", -b.bytes, " bytes more than it was told to expect");
  if (b.flying) fail(b, " expects too few bytes: it is complete, with copies in flight");
  b.phase++;
  b.pending = b.count;
  b.completed = b.arriving.join();
  for (Thread* t : b.waiting) {
    t->know(b.completed);
    wake(*t);
  }
  b.waiting.clear();
}

void Machine::wait(BarrierState& b, int parity, Site site) {
  Thread& t = *current_;
  if ((int)(b.phase & 1) == parity) {
    b.waiting.push_back(&t);
    pause("wait", site);
  } else if (b.completed) {
    t.know(b.completed);
  }
  t.site = site;
}

// Asynchronous copies.

void Machine::issue(Copy copy) {
  copy.agent = {copy.barrier->agent, ++copy.barrier->copies};
  copy.barrier->flying++;
  copy.to->write_async(copy.first, copy.n, copy.agent);
  memset(copy.to->at(copy.first), 0xff, (size_t)copy.n * copy.to->element);
  flying_.push_back(copy);
}

void Machine::land(size_t i) {
  std::swap(flying_[i], flying_.back());
  const Copy copy = flying_.back();
  flying_.pop_back();
  const Block& block = *copy.to->block;
  if (!block.alive) fail("a copy lands in block ", block.index, ", which has ended");
  const size_t bytes = (size_t)copy.n * copy.to->element;
  memcpy(copy.to->at(copy.first), copy.from, bytes);
  BarrierState& b = *copy.barrier;
  b.flying--;
  b.bytes -= (int64_t)bytes;
  b.arriving.add(copy.agent);
  complete(b);
}

}  // namespace kd::cuda::simt
