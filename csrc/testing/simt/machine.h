// SPDX-License-Identifier: Apache-2.0
// The simulated GPU. Clusters run one after another; the threads of a cluster are fibers that take
// turns in random order, each until it waits, and asynchronous copies land at random times in
// between. What the order of one run does not show, the clocks do: every access to shared memory
// has to know of those it conflicts with. A mistake is thrown as an Error, out of the launch.
#pragma once
#include <string.h>

#include <exception>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>

#include "../../kd/cuda/types.h"
#include "clock.h"
#include "fiber.h"

namespace kd::cuda::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Says which kernel and thread it was, too.
[[noreturn]] void raise(const std::string& what);
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  raise(text.str());
}

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && !strcmp(file, other.file);
  }
};

struct Block;

struct Thread {
  Block* block;
  int index;
  uint32_t id;  // in the cluster; also the agent
  Fiber* fiber;
  Clock known;
  uint32_t tick = 1;
  const char* waits = nullptr;  // in what it waits
  Site site;                    // there, or where it has last
  bool finished = false;

  uint64_t word = 0;  // of a warp's exchange: given, then received
  int source = 0;
  uint32_t fenced = 0, fenced_barriers = 0;  // the tick up to which its writes, its inits are

  Epoch now() const { return {id, tick}; }
  void know(const Clock& clock);
};
std::ostream& operator<<(std::ostream&, const Thread&);
std::ostream& operator<<(std::ostream&, Site);

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

  // By the current thread, which may be of another block; check lifetime and races.
  void read(int first, int n);
  void write(int first, int n);
  // By a copy that the current thread issues; earlier writes have to be fenced.
  void write_async(int first, int n, Epoch copy);
  char* at(int i) { return data + (size_t)i * element; }

 private:
  void visit();
  void check(int i, Epoch other, const char* does, const char* did) const;
};
std::ostream& operator<<(std::ostream&, const Region&);

struct BarrierState {
  Block* block;
  size_t offset;
  Epoch initialised;
  int count, pending;
  uint32_t agent;      // of the copies that it counts
  uint32_t copies = 0;
  int flying = 0;      // of those
  int64_t bytes = 0;   // expected and not landed
  uint32_t phase = 0;
  Gathering arriving;
  Clock completed;  // of the phase before
  std::vector<Thread*> waiting;
};
std::ostream& operator<<(std::ostream&, const BarrierState&);

struct Copy {  // in flight
  Region* to;
  int first, n;
  const void* from;
  BarrierState* barrier;
  Epoch agent{0, 0};
};

using Meeting = std::vector<Thread*>;  // who waits for the others

struct Block {
  int index, rank, alive;
  std::vector<Thread*> threads;
  std::unique_ptr<char[]> memory;
  std::map<size_t, Region> regions;  // by offset
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

  const Launch& how() const { return how_; }
  Thread* current() const { return current_; }
  Thread* thread(uint32_t agent) { return agent < threads_.size() ? &threads_[agent] : nullptr; }
  Block& block(int rank);
  Clock join(const Clock& a, const Clock& b) { return joiner_(a, b); }

  void sync_block(Site);
  void sync_warp(Site);
  void sync_cluster(Site);
  // Every lane gives a word and gets that of lane `source`; or for source -1, which lanes gave
  // another one than 0.
  uint64_t exchange(const char* what, uint64_t word, int source, Site);

  void init(size_t offset, int count);
  BarrierState& barrier(size_t offset);
  void arrive(BarrierState& b, int bytes, Site);
  void wait(BarrierState& b, int parity, Site);
  void issue(Copy copy);

 private:
  static void entry();
  void start_cluster(int first_block);
  void run_cluster();
  void check_end();
  void pause(const char* what, Site site);
  void wake(Thread& t) { ready_.push_back(&t); }
  [[noreturn]] void stuck() const;
  uint64_t random(uint64_t below);

  bool meet(Meeting& meeting, size_t size, const char* what, Site site);
  void synchronise(Meeting& meeting, Site site);
  void land(size_t i);
  void complete(BarrierState& b);

  const Launch how_;
  const std::function<void()>& body_;
  uint64_t state_;  // of the random numbers
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Thread*> ready_;
  std::vector<Copy> flying_;
  size_t alive_ = 0;
  uint32_t agents_ = 0;  // threads, each barrier's copies
  Joiner joiner_;

  Meeting cluster_;

  Fiber main_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
};

inline Machine* machine = nullptr;  // the one that runs
inline Thread& here() { return *machine->current(); }

// Of the simulated device, and of the next launches; for tests.
struct Settings {
  Properties properties{90, 2, 227 * 1024};
  uint64_t seed = 0;  // of the order; counts launches
};
inline Settings settings;

void run(const Launch& how, const std::function<void()>& body);

}  // namespace kd::cuda::simt
