// SPDX-License-Identifier: Apache-2.0
// A thread's own copies that a barrier waits for, and which copies of all land next.
#include <algorithm>

#include "hopper_machine.h"

namespace hetconv::host {

// Has the barrier know of what came there.
void Hopper::tell(Phase& p) {
  p.arrived[size_t(p.engine)] = order_.of(p.engine)[size_t(p.engine)];
  order_.tick(p.engine);
}

void Hopper::arrive_copied(uint32_t address) {
  Fiber& own = block->current();
  if (mistake.name == "skip-arrive" && own.fences++ == mistake.at) return;
  const uint32_t offset = barrier_offset(address);
  phase(*block, offset);
  awaited_.push_back({block, int(own.thread.x), offset, false, {}});
  awaited_.back().copies.swap(own.copies);
  own.awaited += !awaited_.back().copies.empty();
}

void Hopper::copies_wait(int before) {
  Fiber& own = block->current();
  auto waits = [&](const Awaited& a) {
    auto committed = [&](const Copy& c) { return c.group < before; };
    return a.at == block && a.thread == int(own.thread.x) &&
           std::any_of(a.copies.begin(), a.copies.end(), committed);
  };
  while (std::any_of(awaited_.begin(), awaited_.end(), waits)) block->yield(Waiting::copies);
}

// First the bytes come, some time later the barrier counts them; until then nobody may look. Those
// of one thread are counted in their order, as each arrival is for all copies before it.
void Hopper::land_copies(size_t index) {
  auto same = [drawn = awaited_[index]](const Awaited& a) {
    return a.at == drawn.at && a.thread == drawn.thread;
  };
  const auto first = std::find_if(awaited_.begin(), awaited_.end(), same);
  if (!first->landed) {
    for (const Copy& c : first->copies) first->at->put(c);
    first->landed = true;
    return;
  }
  const Awaited own = *first;
  awaited_.erase(first);
  Phase& p = phase(*own.at, own.barrier);
  if (p.pending == 0) fail("more than %d arrivals at the barrier at %u", p.count, own.barrier);
  for (const Copy& c : own.copies)
    each_cell(*own.at, c.offset, 16,
              [&](Cell& cell, uint32_t) { order_.landed(cell, p.engine, false); });
  tell(p);
  --p.pending;
  settle(*own.at, own.barrier, p);
  Fiber& fiber = own.at->fiber(own.thread);
  fiber.awaited -= !own.copies.empty();
  if (fiber.waiting == Waiting::copies) own.at->wake(own.thread);
}

bool Hopper::land_one() {
  const size_t count = bulks_.size() + awaited_.size();
  if (!count) return false;
  auto to = [&](size_t i) -> const Block& {
    return i < bulks_.size() ? *bulks_[i].to : *awaited_[i - bulks_.size()].at;
  };
  size_t drawn = draw(unsigned(count));
  for (int again = 0; again < 8 && !favours(to(drawn)); ++again) drawn = draw(unsigned(count));
  if (drawn < bulks_.size())
    land_bulk(drawn);
  else
    land_copies(drawn - bulks_.size());
  return true;
}

}  // namespace hetconv::host
