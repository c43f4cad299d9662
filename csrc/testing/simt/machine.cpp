// SPDX-License-Identifier: Apache-2.0
// Launches, and whose turn it is.
#include "machine.h"

#include <mutex>

namespace kd::cuda::simt {

void run(const Launch& how, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Machine m(how, body);
  machine = &m;
  struct Reset {
    ~Reset() { machine = nullptr; }
  } reset;
  m.run();
}

Machine::Machine(const Launch& how, const std::function<void()>& body)
    : how_(how), body_(body), state_(++settings.seed * 0x9e3779b97f4a7c15u) {}

uint64_t Machine::random(uint64_t below) {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (z ^ z >> 31) % below;
}

void Machine::run() {
  const Properties& device = settings.properties;
  if (how_.blocks < 1 || how_.blocks > INT32_MAX) fail("so many blocks cannot be launched");
  if (how_.threads < 1 || how_.threads > 1024 || how_.threads % warp_threads)
    fail("threads of a block have to be a multiple of 32, up to 1024");
  if (how_.cluster < 1 || how_.cluster > 8 || how_.blocks % how_.cluster)
    fail("blocks have to be a multiple of the cluster's, which has up to 8");
  if (how_.cluster > 1 && device.capability < 90) fail("this device has no clusters");
  if (how_.shared_bytes > device.shared_bytes) fail("more shared memory than a block can have");
  std::vector<int> order(how_.blocks / how_.cluster);
  for (size_t i = 0; i < order.size(); i++) {
    const size_t j = random(i + 1);
    order[i] = order[j];
    order[j] = (int)i * how_.cluster;
  }
  for (int first_block : order) {
    start_cluster(first_block);
    run_cluster();
    check_end();
  }
}

void Machine::start_cluster(int first_block) {
  static std::vector<std::unique_ptr<Fiber>> fibers;  // kept: their stacks are costly to map
  const int threads = how_.threads, all = how_.cluster * threads;
  while ((int)fibers.size() < all) fibers.push_back(std::make_unique<Fiber>());
  threads_.assign(all, Thread{});
  blocks_.clear();
  blocks_.resize(how_.cluster);
  alive_ = all;
  agents_ = all;
  const Clock nothing = std::make_shared<const Ticks>();
  for (int id = 0; id < all; id++) {
    Thread& t = threads_[id];
    t.block = &blocks_[id / threads];
    t.index = id % threads;
    t.id = (uint32_t)id;
    t.fiber = fibers[id].get();
    t.fiber->start(entry);
    t.known = nothing;
    t.block->threads.push_back(&t);
    wake(t);
  }
  for (int rank = 0; rank < how_.cluster; rank++) {
    Block& b = blocks_[rank];
    b.index = first_block + rank;
    b.rank = rank;
    b.alive = threads;
    b.memory.reset(new char[how_.shared_bytes]);
    memset(b.memory.get(), 0xff, how_.shared_bytes);  // NaN in every floating-point format
    b.warps.resize(threads / warp_threads);
  }
}

void Machine::run_cluster() {
  while (alive_) {
    if (!flying_.empty() && (ready_.empty() || random(4) == 0)) {
      land(random(flying_.size()));
      continue;
    }
    if (ready_.empty()) stuck();
    std::swap(ready_[random(ready_.size())], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    main_.switch_to(*current_->fiber);
    current_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }
}

void Machine::entry() {
  Thread& t = here();
  Fiber::arrived(*t.fiber);
  try {
    machine->body_();
  } catch (...) {
    machine->error_ = std::current_exception();
  }
  t.finished = true;
  t.block->alive--;
  machine->alive_--;
  t.fiber->switch_to(machine->main_, true);
}

void Machine::pause(const char* what, Site site) {
  Thread& t = *current_;
  t.waits = what;
  t.site = site;
  t.fiber->switch_to(main_);
  t.waits = nullptr;
}

// What a cluster must not leave behind: uses of its memory that its end has not waited for.
void Machine::check_end() {
  const auto known_in = [](const Block& b, Epoch e) {
    return std::any_of(b.threads.begin(), b.threads.end(),
                       [&](const Thread* t) { return knows(t->known, e); });
  };
  for (const Block& b : blocks_) {
    for (const auto& [id, tick] : b.visits)
      if (!known_in(b, {id, tick}))
        fail(threads_[id], " uses the memory of block ", b.index, ", which may have ended by then");
    for (const auto& [offset, barrier] : b.barriers)
      if (!known_in(b, {barrier.agent, barrier.copies}))
        fail("nobody waited for the last copy that ", barrier, " counts");
  }
}

// Errors.

std::ostream& operator<<(std::ostream& out, const Thread& t) {
  return out << "thread " << t.index << " of block " << t.block->index;
}
std::ostream& operator<<(std::ostream& out, Site site) {
  return out << site.file << ":" << site.line;
}

void raise(const std::string& what) {
  std::ostringstream text;
  text << machine->how().name << ": ";
  if (const Thread* t = machine->current()) {
    text << *t << " ";
    if (t->site.line) text << "(last synchronised at " << t->site << ") ";
  }
  throw Error(text.str() + what);
}

// Says who waits where, a line of the kernel at a time, and what its barriers lack.
void Machine::stuck() const {
  std::ostringstream text;
  const auto where = [](const Thread& t) {
    std::ostringstream place;
    if (t.finished) place << "at their end";
    else place << "in " << t.waits << " at " << t.site;
    return place.str();
  };
  std::map<std::string, std::vector<const Thread*>> places;
  for (const Thread& t : threads_) places[where(t)].push_back(&t);
  for (const auto& [place, threads] : places)
    text << " " << threads.size() << " are " << place << ", first " << *threads[0] << ".";
  for (const Block& b : blocks_)
    for (const auto& [offset, barrier] : b.barriers)
      if (barrier.bytes || barrier.pending < barrier.count)
        text << " " << barrier << " lacks " << barrier.pending << " arrivals and " << barrier.bytes
             << " bytes.";
  fail("no thread can go on.", text.str());
}

}  // namespace kd::cuda::simt
