// SPDX-License-Identifier: Apache-2.0
// The simulated GPU. Clusters run one after another; the threads of a cluster are fibers that take
// turns in random order, each until it waits, and asynchronous copies land at random times in
// between. What the order of one run does not show, the clocks do: every access to shared memory
// has to know of those it conflicts with.
#pragma once
#include <string.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "../../kd/cuda/types.h"
#include "clock.h"
#include "fiber.h"

namespace kd::cuda::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && !strcmp(file, other.file); }
};

struct Block;

struct Thread {
  Block* block;
  int index;
  uint32_t id;  // in the cluster; also the agent
  Fiber* fiber;
  Clock known;
  uint32_t tick = 1;
  const char* waits = nullptr;  // in what it waits, and where
  Site site;
  bool finished = false;

  uint64_t word = 0;  // of a warp's exchange: given, then received
  int source = 0;
  uint32_t arrived = 0, waited = 0;          // at the cluster's barrier: how often
  bool waits_for_cluster = false;            // in Barrier::wait_cluster
  uint32_t fenced = 0, fenced_barriers = 0;  // the tick up to which its writes, its inits are
  uint32_t group = 1, last_group = 0;        // of copies: open; the last that is not empty

  Epoch now() const { return {id, tick}; }
  void know(const Clock& clock);
};

// An element of shared memory: its last write, and the reads since.
struct Cell {
  Epoch written{0, 0}, read{0, 0};
  std::unique_ptr<std::vector<Epoch>> more;  // further readers
};

// What one `take` of SharedMemory has handed out.
struct Region {
  Block* block;
  size_t offset;
  int count, element;  // elements, and the bytes of one
  char* data;
  std::vector<Cell> cells;

  // By the current thread, which may be of another block; check bounds, lifetime and races.
  void read(int first, int n) { access(first, n, false); }
  void write(int first, int n) { access(first, n, true); }
  // By an asynchronous copy that the current thread issues.
  void write_async(int first, int n, Epoch copy, bool bulk);

 private:
  void access(int first, int n, bool writes);
  void check(int i, Epoch other, const char* does, const char* did) const;
};

struct BarrierState {
  size_t offset;
  Epoch initialised;
  int count, pending;
  int64_t bytes = 0;  // expected and not landed
  uint32_t phase = 0, agent = 0, copies = 0;
  int flying = 0;
  bool remote = false;  // another block has taken part
  Gathering arriving;
  Clock completed;
  std::vector<Thread*> waiting;
};

std::string name(const Thread& t);
std::string at(Site site);

struct Copy {  // in flight
  Region* to;
  int first, n;
  const void* from;       // or null: `word`
  uint64_t word;
  BarrierState* barrier;  // in the block of `to`; or null: of a group of its thread
  Epoch agent{0, 0};
};

using Meeting = std::vector<Thread*>;  // who waits for the others

struct Block {
  int index, rank, alive;
  std::vector<Thread*> threads;
  std::unique_ptr<char[]> memory;
  std::map<size_t, Region> regions;
  std::map<size_t, BarrierState> barriers;
  Meeting all;
  std::vector<Meeting> warps;
  std::map<uint32_t, uint32_t> visits;  // by threads of other blocks: the tick of the last

  Region& region(size_t offset, int count, int element);
};

class Machine {
 public:
  Machine(const Launch& how, const std::function<void()>& body);
  void run();

  Thread& current() { return *current_; }
  const Launch& how() const { return how_; }
  Block& block(int rank);
  Thread* thread(uint32_t agent) { return agent < threads_.size() ? &threads_[agent] : nullptr; }
  Epoch copies(const Thread& t, uint32_t group) const {
    return {(uint32_t)threads_.size() + t.id, group};
  }
  Clock join(const Clock& a, const Clock& b) { return joiner_(a, b); }

  void sync_block(Site);
  void sync_warp(Site);
  void cluster_arrive(Site);
  void cluster_wait(Site);
  // Every lane gives a word and gets that of lane `source`; or for source -1 the lanes whose word
  // is not 0.
  uint64_t exchange(const char* what, uint64_t word, int source, Site);

  BarrierState& barrier(Block& block, size_t offset);
  void init(size_t offset, int count);
  void arrive(Block& block, size_t offset, int bytes, Site);
  void wait(size_t offset, int parity, bool cluster, Site);
  void issue(Copy copy);
  void wait_copies(uint32_t groups_left);
  [[noreturn]] void fail(const std::string& what) const;

 private:
  static void entry();
  void run_cluster(int first_block);
  void pause(const char* what, Site site);
  void wake(Thread& t);
  bool meet(Meeting& meeting, size_t size, const char* what, Site site);
  void synchronise(Meeting& meeting, Site site);
  void land(size_t i);
  void complete(Block& block, BarrierState& barrier);
  void check_end();
  [[noreturn]] void stuck() const;
  uint64_t random(uint64_t below);

  Launch how_;
  const std::function<void()>& body_;
  uint64_t state_;  // of the random numbers
  uint32_t agents_ = 0;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Thread*> ready_;
  std::vector<Copy> flying_;
  size_t alive_ = 0;
  size_t cluster_arrivals_ = 0;
  uint32_t cluster_phase_ = 0;
  Gathering cluster_arriving_;
  std::vector<Thread*> cluster_waiting_;
  Clock cluster_completed_;
  Joiner joiner_;
  Fiber main_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
};

inline Machine* machine = nullptr;  // the one that runs
inline Thread& here() { return machine->current(); }

// Of the simulated device, and of the next launches; for tests.
struct Settings {
  Properties properties{90, 2, 227 * 1024};
  uint64_t seed = 0;  // of the order; counts launches
};
inline Settings settings;

void run(const Launch& how, const std::function<void()>& body);

}  // namespace kd::cuda::simt
