// SPDX-License-Identifier: Apache-2.0
// Copies that a barrier waits for.
#include <algorithm>
#include <cstring>

#include "hopper_machine.h"

namespace hetconv::host {

// Bulk copies ------------------------------------------------------------------------------------

void Hopper::copy(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier,
                  uint32_t blocks) {
  if (mistake.name == "skip-bulk" && copies_++ == mistake.at) return;
  if (bytes % 16 || uintptr_t(source) % 16)
    fail("a bulk copy of %u bytes from %p, which is not aligned to 16", bytes, source);
  if (blocks >> watched_.size()) fail("the cluster has no such blocks: %u", blocks);
  // Addresses of this block; the others have the copy and its barrier as far from their begin.
  const uint32_t offset = block->offset(address, bytes, 16, "a bulk copy");
  const uint32_t counts = barrier_offset(barrier);
  for (Watched& w : watched_) {
    if (!(blocks >> w.block->rank() & 1)) continue;
    phase(*w.block, counts);
    int other = 0;
    for (uint32_t i = 0; i < bytes; i += 16) {
      const char* wrong = order_.copied_by(cell(*w.block, offset + i), me(), other);
      say(wrong, *w.block, offset + i, other);
    }
    bulks_.push_back({w.block, offset, static_cast<const char*>(source), bytes, counts});
  }
}

void Hopper::land_bulk(size_t index) {
  std::swap(bulks_[index], bulks_.back());
  const Bulk bulk = bulks_.back();
  bulks_.pop_back();
  if (bulk.to->left() == 0) fail("a copy comes to block %d, which has ended", bulk.to->rank());
  std::memcpy(bulk.to->memory(bulk.offset), bulk.source, bulk.bytes);
  Phase& p = phase(*bulk.to, bulk.barrier);
  for (uint32_t i = 0; i < bulk.bytes; i += 16)
    order_.landed(cell(*bulk.to, bulk.offset + i), p.engine, true);
  p.bytes -= bulk.bytes;
  tell(p);
  settle(*bulk.to, bulk.barrier, p);
}

// Has the barrier know of what came there.
void Hopper::tell(Phase& p) {
  p.arrived[size_t(p.engine)] = order_.of(p.engine)[size_t(p.engine)];
  order_.tick(p.engine);
}

// A thread's own copies --------------------------------------------------------------------------

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
  for (const Copy& c : own.copies) order_.landed(cell(*own.at, c.offset), p.engine, false);
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
