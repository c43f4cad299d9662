// SPDX-License-Identifier: Apache-2.0
// Shared memory, and whether an access may happen at the same time as another.
#include "machine.h"

namespace kd::cuda::simt {

Region& Block::region(size_t offset, int count, int element) {
  const size_t end = offset + (size_t)count * element, all = machine->how().shared_bytes;
  if (end > all) fail("takes shared memory up to byte ", end, ", and was launched with ", all);
  const auto [found, is_new] = regions.try_emplace(offset);
  Region& r = found->second;
  if (is_new) {
    r = Region{this, offset, count, element, memory.get() + offset, {}};
    r.cells.resize(count);
  }
  if (r.count != count || r.element != element)
    fail("takes other shared memory at byte ", offset, " than another thread");
  return r;
}

std::ostream& operator<<(std::ostream& out, const Region& r) {
  return out << "the shared array at byte " << r.offset << " of block " << r.block->index;
}

void Region::check(int i, Epoch other, const char* does, const char* did) const {
  if (other.agent == here().id || knows(here().known, other)) return;
  std::ostringstream who;
  if (const Thread* thread = machine->thread(other.agent)) who << *thread;
  else who << "an asynchronous copy";
  fail(does, " element ", i, " of ", *this, ", which ", who.str(), " ", did,
       ", without having synchronised with it");
}

// Another block's memory is there between two moments that have to be synchronised with: that it
// has started is known, and the access to those who end last, which check_end looks into.
void Region::visit() {
  Thread& t = here();
  if (t.block == block) return;
  if (!block->alive) fail("uses the memory of block ", block->index, ", which has ended");
  if (std::none_of(block->threads.begin(), block->threads.end(),
                   [&](const Thread* other) { return knows(t.known, {other->id, 1}); }))
    fail("uses the memory of block ", block->index, ", which may not have started");
  block->visits[t.id] = t.tick;
}

void Region::read(int first, int n) {
  visit();
  const Thread& t = here();
  for (int i = first; i < first + n; i++) {
    Cell& cell = cells[i];
    if (cell.written.tick == 0)
      fail("reads element ", i, " of ", *this, ", which nothing has written");
    check(i, cell.written, "reads", "has written");
    if (cell.read.agent != t.id && !knows(t.known, cell.read)) {
      if (!cell.more) cell.more = std::make_unique<std::vector<Epoch>>();
      cell.more->push_back(cell.read);
    }
    cell.read = t.now();
  }
}

void Region::write(int first, int n) {
  visit();
  for (int i = first; i < first + n; i++) {
    Cell& cell = cells[i];
    check(i, cell.written, "writes", "has written");
    check(i, cell.read, "writes", "has read");
    if (cell.more)
      for (Epoch reader : *cell.more) check(i, reader, "writes", "has read");
    cell = Cell{here().now(), {0, 0}, nullptr};
  }
}

void Region::write_async(int first, int n, Epoch copy) {
  for (int i = first; i < first + n; i++) {
    const Epoch written = cells[i].written;
    const Thread* writer = written.tick ? machine->thread(written.agent) : nullptr;
    if (writer && writer->fenced < written.tick)
      fail("copies to where ", *writer, " has written, without fence_async after that");
  }
  write(first, n);
  for (int i = first; i < first + n; i++) cells[i].written = copy;
}

}  // namespace kd::cuda::simt
