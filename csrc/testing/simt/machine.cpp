// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <mutex>

namespace kd::cuda::simt {

// A launch -----------------------------------------------------------------------------------------

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
  for (int first_block : order) run_cluster(first_block);
}

void Machine::run_cluster(int first_block) {
  static std::vector<std::unique_ptr<Fiber>> fibers;  // kept: their stacks are costly to map
  const int threads = how_.threads, all = how_.cluster * threads;
  while ((int)fibers.size() < all) fibers.push_back(std::make_unique<Fiber>());
  threads_.assign(all, Thread{});
  blocks_.clear();
  blocks_.resize(how_.cluster);
  ready_.clear();
  cluster_arrivals_ = 0;
  cluster_phase_ = 0;
  agents_ = 2 * all;
  alive_ = all;
  const Clock nothing = std::make_shared<const Ticks>();
  for (int rank = 0; rank < how_.cluster; rank++) {
    Block& b = blocks_[rank];
    b.index = first_block + rank;
    b.rank = rank;
    b.alive = threads;
    b.memory.reset(new char[how_.shared_bytes]);
    memset(b.memory.get(), 0xff, how_.shared_bytes);  // NaN in every floating-point format
    b.warps.resize(threads / warp_threads);
    for (int i = 0; i < threads; i++) {
      const int id = rank * threads + i;
      Thread& t = threads_[id];
      t.block = &b;
      t.index = i;
      t.id = (uint32_t)id;
      t.fiber = fibers[id].get();
      t.fiber->start(entry);
      t.known = nothing;
      b.threads.push_back(&t);
      ready_.push_back(&t);
    }
  }
  while (alive_) {
    if (!flying_.empty() && (ready_.empty() || random(4) == 0)) {
      land(random(flying_.size()));
      continue;
    }
    if (ready_.empty()) stuck();
    const size_t i = random(ready_.size());
    current_ = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    main_.switch_to(*current_->fiber);
    current_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }
  check_end();
}

void Machine::entry() {
  Fiber::arrived(*here().fiber);
  try {
    machine->body_();
  } catch (...) {
    machine->error_ = std::current_exception();
  }
  Thread& t = here();
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

void Machine::wake(Thread& t) { ready_.push_back(&t); }

Block& Machine::block(int rank) {
  if (rank < 0 || rank >= how_.cluster) fail("asks for block " + std::to_string(rank) + " of the cluster");
  return blocks_[rank];
}

// Errors -------------------------------------------------------------------------------------------

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.index) + " of block " + std::to_string(t.block->index);
}

std::string at(Site site) {
  return std::string(" at ") + site.file + ":" + std::to_string(site.line);
}

void Machine::fail(const std::string& what) const {
  std::string text = std::string(how_.name) + ": ";
  if (current_) {
    text += name(*current_);
    if (current_->site.line) text += ", last synchronised" + at(current_->site) + ",";
    text += " ";
  }
  throw Error(text + what);
}

void Machine::stuck() const {
  std::string text = "no thread can go on.";
  const auto report = [&](auto belongs, const std::string& what) {
    int n = 0;
    const Thread* first = nullptr;
    for (const Thread& t : threads_)
      if (belongs(t) && n++ == 0) first = &t;
    if (n) text += " " + std::to_string(n) + " " + what + ", first " + name(*first) + ".";
  };
  std::vector<const Thread*> seen;
  for (const Thread& t : threads_) {
    const auto alike = [&](const Thread& o) {
      return !o.finished && o.waits == t.waits && o.site == t.site;
    };
    if (t.finished || std::any_of(seen.begin(), seen.end(), [&](auto* o) { return alike(*o); })) continue;
    seen.push_back(&t);
    report(alike, std::string("in ") + t.waits + at(t.site));
  }
  report([](const Thread& t) { return t.finished; }, "have ended");
  for (const Block& b : blocks_)
    for (const auto& [offset, barrier] : b.barriers)
      if (barrier.bytes || (barrier.pending && barrier.pending != barrier.count))
        text += " The barrier at byte " + std::to_string(offset) + " of block " + std::to_string(b.index) +
                " lacks " + std::to_string(barrier.pending) + " arrivals and " +
                std::to_string(barrier.bytes) + " bytes.";
  fail(text);
}

// What a cluster must not leave behind.
void Machine::check_end() {
  const auto known_in = [](const Block& b, Epoch e) {
    return std::any_of(b.threads.begin(), b.threads.end(),
                       [&](const Thread* t) { return t->id == e.agent || knows(t->known, e); });
  };
  for (const Block& b : blocks_) {
    const std::string where = " of block " + std::to_string(b.index);
    for (const auto& [id, tick] : b.visits)
      if (!known_in(b, {id, tick}))
        fail(name(threads_[id]) + " uses the memory" + where + ", which may have ended by then");
    for (const auto& [offset, barrier] : b.barriers)
      if (!known_in(b, {barrier.agent, barrier.copies}))
        fail("nobody waited for the last copy that the barrier at byte " + std::to_string(offset) + where +
             " counts");
  }
  for (const Thread& t : threads_)
    if (!knows(t.known, copies(t, t.last_group))) fail(name(t) + " ends without waiting for its copies");
}

// Meeting ------------------------------------------------------------------------------------------

// True for the last of `size` threads, which then has to let the others go on.
bool Machine::meet(Meeting& meeting, size_t size, const char* what, Site site) {
  if (!meeting.empty()) {
    const Thread& other = *meeting[0];
    if (strcmp(other.waits, what) || !(other.site == site))
      fail(std::string("is in ") + what + at(site) + ", where " + name(other) + " is in " + other.waits +
           at(other.site));
  }
  meeting.push_back(current_);
  if (meeting.size() == size) return true;
  pause(what, site);
  return false;
}

void Machine::synchronise(Meeting& meeting, Site site) {
  Gathering all;
  for (const Thread* t : meeting) {
    all.add(t->known);
    all.add(t->now());
  }
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

uint64_t Machine::exchange(const char* what, uint64_t word, int source, Site site) {
  Thread& t = *current_;
  t.word = word;
  t.source = source;
  Meeting& warp = t.block->warps[t.index / warp_threads];
  if (meet(warp, warp_threads, what, site)) {
    t.site = site;
    uint64_t words[warp_threads], votes = 0;
    for (const Thread* lane : warp) {
      words[lane->index % warp_threads] = lane->word;
      votes |= (uint64_t)(lane->word != 0) << lane->index % warp_threads;
    }
    for (Thread* lane : warp) {
      lane->word = lane->source < 0 ? votes : words[lane->source % warp_threads];
      if (lane != &t) wake(*lane);
    }
    warp.clear();
  }
  return t.word;
}

void Machine::cluster_arrive(Site site) {
  Thread& t = *current_;
  if (t.arrived != t.waited) fail("arrives at the cluster's barrier twice without waiting" + at(site));
  t.arrived++;
  t.site = site;
  cluster_arriving_.add(t.known);
  cluster_arriving_.add(t.now());
  t.tick++;
  if (++cluster_arrivals_ < threads_.size()) return;
  cluster_arrivals_ = 0;
  cluster_phase_++;
  cluster_completed_ = cluster_arriving_.join();
  for (Thread* waiting : cluster_waiting_) wake(*waiting);
  cluster_waiting_.clear();
}

void Machine::cluster_wait(Site site) {
  Thread& t = *current_;
  if (t.arrived == t.waited) fail("waits at the cluster's barrier without having arrived" + at(site));
  t.waited++;
  if (cluster_phase_ < t.waited) {
    cluster_waiting_.push_back(&t);
    pause("cluster_wait", site);
  }
  t.site = site;
  t.know(cluster_completed_);
}

// Barriers and copies ------------------------------------------------------------------------------

void Machine::init(size_t offset, int count) {
  if (settings.properties.capability < 90) fail("this device has no such barriers");
  const auto [found, is_new] = current_->block->barriers.try_emplace(offset);
  if (!is_new) fail("initialises a barrier twice");
  BarrierState& b = found->second;
  b.offset = offset;
  b.initialised = current_->now();
  b.count = b.pending = count;
  b.agent = agents_++;
}

BarrierState& Machine::barrier(Block& block, size_t offset) {
  const auto found = block.barriers.find(offset);
  if (found == block.barriers.end()) fail("uses a barrier that has not been initialised");
  BarrierState& b = found->second;
  if (b.initialised.agent != current_->id) {
    if (!knows(current_->known, b.initialised)) fail("uses a barrier, and has not synchronised with its init");
    if (thread(b.initialised.agent)->fenced_barriers < b.initialised.tick)
      fail("uses a barrier that was initialised without fence_barriers");
  }
  if (&block != current_->block) b.remote = true;
  return b;
}

void Machine::arrive(Block& block, size_t offset, int bytes, Site site) {
  BarrierState& b = barrier(block, offset);
  Thread& t = *current_;
  t.site = site;
  if (b.pending == 0) fail("arrives at a barrier that has had all arrivals of its phase");
  b.arriving.add(t.known);
  b.arriving.add(t.now());
  t.tick++;
  b.pending--;
  b.bytes += bytes;
  complete(block, b);
}

void Machine::complete(Block& block, BarrierState& b) {
  if (b.pending) return;
  const std::string which =
      "barrier at byte " + std::to_string(b.offset) + " of block " + std::to_string(block.index);
  if (b.bytes < 0)
    fail("the " + which + " has received " + std::to_string(-b.bytes) + " bytes more than it was told to expect");
  if (b.bytes) return;
  if (b.flying) fail("the " + which + " is complete while copies that it counts are in flight: it expects too few bytes");
  b.phase++;
  b.pending = b.count;
  b.completed = b.arriving.join();
  for (Thread* t : b.waiting) {
    if (b.remote && !t->waits_for_cluster) fail("the " + which + " needs wait_cluster: other blocks arrive at it");
    t->know(b.completed);
    wake(*t);
  }
  b.waiting.clear();
}

void Machine::wait(size_t offset, int parity, bool cluster, Site site) {
  Thread& t = *current_;
  BarrierState& b = barrier(*t.block, offset);
  t.waits_for_cluster = cluster;
  if ((int)(b.phase & 1) == parity) {
    b.waiting.push_back(&t);
    pause(cluster ? "wait_cluster" : "wait", site);
  } else if (b.completed) {
    if (b.remote && !cluster) fail("waits, where other blocks arrive: wait_cluster");
    t.know(b.completed);
  }
  t.site = site;
}

void Machine::issue(Copy copy) {
  Thread& t = *current_;
  if (copy.barrier) {
    copy.agent = {copy.barrier->agent, ++copy.barrier->copies};
    copy.barrier->flying++;
  } else {
    t.last_group = t.group;
    copy.agent = copies(t, t.group);
  }
  copy.to->write_async(copy.first, copy.n, copy.agent, copy.barrier && copy.from);
  memset(copy.to->data + (size_t)copy.first * copy.to->element, 0xff, (size_t)copy.n * copy.to->element);
  flying_.push_back(copy);
}

void Machine::land(size_t i) {
  const Copy copy = flying_[i];
  flying_[i] = flying_.back();
  flying_.pop_back();
  if (!copy.to->block->alive) fail("a copy lands in a block that has ended");
  const size_t bytes = (size_t)copy.n * copy.to->element;
  memcpy(copy.to->data + (size_t)copy.first * copy.to->element, copy.from ? copy.from : &copy.word, bytes);
  if (!copy.barrier) return;
  BarrierState& b = *copy.barrier;
  b.flying--;
  b.bytes -= (int64_t)bytes;
  b.arriving.add(copy.agent);
  complete(*copy.to->block, b);
}

void Machine::wait_copies(uint32_t groups_left) {
  Thread& t = *current_;
  const uint32_t done = t.group - 1 > groups_left ? t.group - 1 - groups_left : 0;
  const Epoch last = copies(t, done);
  for (size_t i = flying_.size(); i-- > 0;) {
    const Copy& copy = flying_[i];
    if (!copy.barrier && copy.agent.agent == last.agent && copy.agent.tick <= last.tick) land(i);
  }
  Gathering of_copies;
  of_copies.add(t.known);
  of_copies.add(last);
  t.known = of_copies.join();
}

void Thread::know(const Clock& clock) { known = machine->join(known, clock); }

// Shared memory ------------------------------------------------------------------------------------

Region& Block::region(size_t offset, int count, int element) {
  auto found = regions.find(offset);
  if (found == regions.end()) {
    if (offset + (size_t)count * element > machine->how().shared_bytes)
      machine->fail("takes shared memory up to byte " + std::to_string(offset + (size_t)count * element) +
                    ", and was launched with " + std::to_string(machine->how().shared_bytes));
    found = regions.emplace(offset, Region{this, offset, count, element, memory.get() + offset, {}}).first;
    found->second.cells.resize(count);
  }
  Region& r = found->second;
  if (r.count != count || r.element != element)
    machine->fail("takes other shared memory at byte " + std::to_string(offset) + " than another thread");
  return r;
}

void Region::check(int i, Epoch other, const char* does, const char* did) const {
  if (other.agent == here().id || knows(here().known, other)) return;
  const Thread* thread = machine->thread(other.agent);
  machine->fail(std::string(does) + " element " + std::to_string(i) + " of the shared array at byte " +
                std::to_string(offset) + " of block " + std::to_string(block->index) + ", which " +
                (thread ? name(*thread) : "an asynchronous copy") + " " + did +
                ", without having synchronised with it");
}

void Region::access(int first, int n, bool writes) {
  Thread& t = here();
  if (t.block != block) {
    if (!block->alive) machine->fail("uses the memory of a block that has ended");
    const auto met = [&](const Thread* o) { return knows(t.known, {o->id, 1}); };
    if (!std::any_of(block->threads.begin(), block->threads.end(), met))
      machine->fail("uses the memory of a block that may not have started");
    block->visits[t.id] = t.tick;
  }
  for (int i = first; i < first + n; i++) {
    Cell& cell = cells[i];
    check(i, cell.written, writes ? "writes" : "reads", "has written");
    if (writes) {
      check(i, cell.read, "writes", "has read");
      if (cell.more)
        for (Epoch reader : *cell.more) check(i, reader, "writes", "has read");
      cell.more.reset();
      cell.read = {0, 0};
      cell.written = t.now();
      continue;
    }
    if (cell.written.tick == 0)
      machine->fail("reads element " + std::to_string(i) + " of the shared array at byte " +
                    std::to_string(offset) + ", which nothing has written");
    if (cell.read.agent != t.id && !knows(t.known, cell.read)) {
      if (!cell.more) cell.more.reset(new std::vector<Epoch>);
      cell.more->push_back(cell.read);
    }
    cell.read = t.now();
  }
}

void Region::write_async(int first, int n, Epoch copy, bool bulk) {
  for (int i = first; bulk && i < first + n; i++) {
    const Epoch written = cells[i].written;
    const Thread* writer = written.tick ? machine->thread(written.agent) : nullptr;
    if (writer && writer->fenced < written.tick)
      machine->fail("copies to where " + name(*writer) + " writes, without fence_async after that");
  }
  access(first, n, true);
  for (int i = first; i < first + n; i++) cells[i].written = copy;
}

}  // namespace kd::cuda::simt
