// SPDX-License-Identifier: Apache-2.0
#include "hopper_machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hetconv::host {

namespace {

constexpr int kMostPhases = 128;  // of a cluster

}  // namespace

Hopper::Hopper(const std::vector<Block*>& blocks, int grain)
    : threads_(blocks[0]->threads()),
      groups_((threads_ + 127) / 128),
      engines_(int(blocks.size()) * threads_),
      grain_(grain),
      order_(engines_ + int(blocks.size()) * groups_ + kMostPhases) {
  for (Block* b : blocks) {
    watched_.push_back({b, std::vector<Cell>(size_t(b->size() / grain)), {}, {}, {}});
    watched_.back().warpgroups.resize(size_t(groups_));
    b->hopper = this;
  }
}

int Hopper::me() const { return member(*block, int(block->current().thread.x)); }

int Hopper::engine_of(const Block& at, int warpgroup) const {
  return engines_ + at.rank() * groups_ + warpgroup;
}

std::string Hopper::name(int who) const {
  if (who < engines_)
    return "thread " + std::to_string(who % threads_) + " of block " +
           std::to_string(who / threads_);
  const int products = int(watched_.size()) * groups_;
  if (who < engines_ + products)
    return "the products of warpgroup " + std::to_string((who - engines_) % groups_);
  return "a bulk copy";
}

void Hopper::say(const char* wrong, const Block& at, uint32_t offset, int other) const {
  if (!wrong) return;
  const std::string where =
      "shared byte " + std::to_string(offset) + " of block " + std::to_string(at.rank());
  std::string text = wrong;
  for (const std::string& word : {where, name(other)}) {
    const size_t found = text.find("%s");
    if (found != std::string::npos) text.replace(found, 2, word);
  }
  fail("%s", text.c_str());
}

// Shared memory ----------------------------------------------------------------------------------

void Hopper::access(Block& at, int thread, uint32_t offset, int bytes, const char* verb,
                    const char* (Order::*check)(Cell&, int, int&)) {
  if (bytes % grain_) fail("%s %d bytes of shared memory, watched by %d", verb, bytes, grain_);
  each_cell(at, offset, uint32_t(bytes), [&](Cell& cell, uint32_t place) {
    int other = 0;
    const char* wrong = (order_.*check)(cell, member(at, thread), other);
    say(wrong, at, place, other);
  });
}

void Hopper::read(Block& at, int thread, uint32_t offset, int bytes) {
  access(at, thread, offset, bytes, "reads", &Order::read);
}

void Hopper::write(Block& at, int thread, uint32_t offset, int bytes) {
  access(at, thread, offset, bytes, "writes", &Order::write);
}

void Hopper::coming(Block& at, uint32_t offset, bool is) {
  each_cell(at, offset, 16, [&](Cell& cell, uint32_t) { cell.coming = is; });
}

void Hopper::fence() {
  Fiber& own = block->current();
  if (mistake.name == "skip-fence" && own.fences++ == mistake.at) return;
  order_.fence(me());
}

// Barriers ---------------------------------------------------------------------------------------

Hopper::Phase& Hopper::phase(const Block& at, uint32_t offset) {
  auto& mbarriers = watched_[size_t(at.rank())].mbarriers;
  const auto found = mbarriers.find(offset);
  if (found == mbarriers.end()) fail("no barrier was made at %u of block %d", offset, at.rank());
  return found->second;
}

void Hopper::mbarrier_init(uint32_t address, int count) {
  const uint32_t offset = barrier_offset(address);
  Watched& own = watched_[size_t(block->rank())];
  if (own.mbarriers.count(offset)) fail("a barrier is made at %u twice", offset);
  if (++phases_ > kMostPhases) fail("more than %d barriers", kMostPhases);
  Phase& p = own.mbarriers[offset];
  p.count = p.pending = count;
  p.engine = engines_ + int(watched_.size()) * groups_ + phases_ - 1;
  p.arrived = p.known = Clock(order_.of(0).size(), 0);
  each_cell(*block, offset, 8, [](Cell& cell, uint32_t) { cell.closed = true; });
}

void Hopper::settle(Block& at, uint32_t offset, Phase& p) {
  if (p.bytes < 0 && p.pending == 0)
    fail("more bytes came to the barrier at %u than expected", offset);
  if (p.pending || p.bytes) return;
  ++p.ended;
  p.pending = p.count;
  Order::join(p.known, p.arrived);
  std::vector<Waiter> waiters;
  waiters.swap(p.waiters);
  for (const Waiter& w : waiters)
    if (has_ended(p, w.parity))
      at.wake(w.thread);
    else
      p.waiters.push_back(w);
}

void Hopper::mbarrier_arrive(uint32_t address, uint32_t rank, uint32_t expected) {
  Fiber& own = block->current();
  if (mistake.name == "skip-arrive" && !expected && own.fences++ == mistake.at) return;
  if (rank >= watched_.size()) fail("the cluster has no block %u", rank);
  Watched& there = watched_[rank];
  if (there.block->left() == 0) fail("arrives at a barrier of block %u, which has ended", rank);
  const uint32_t offset = barrier_offset(address);  // the same in every block
  Phase& p = phase(*there.block, offset);
  if (expected && mistake.name == "wrong-bytes" && expected_++ == mistake.at) expected += 16;
  if (p.pending == 0) fail("more than %d arrivals at the barrier at %u", p.count, offset);
  Order::join(p.arrived, order_.of(me()));
  order_.tick(me());
  p.bytes += expected;
  --p.pending;
  settle(*there.block, offset, p);
}

void Hopper::mbarrier_wait(uint32_t address, uint32_t parity, uint32_t first) {
  if (address < first || (address - first) % 8)
    fail("no barrier counts from %u to %u", first, address);
  Fiber& own = block->current();
  if (mistake.name == "skip-phase" && own.mbarriers++ == mistake.at) return;
  const uint32_t offset = barrier_offset(address);
  Phase& p = phase(*block, offset);
  while (!has_ended(p, parity)) {
    own.place = offset;
    p.waiters.push_back({int(own.thread.x), parity});
    block->yield(Waiting::phase);
  }
  Order::join(order_.of(me()), p.known);
}

std::string Hopper::state(const Block& at, uint32_t offset) const {
  const Phase& p = watched_[size_t(at.rank())].mbarriers.at(offset);
  return "which lacks " + std::to_string(p.pending) + " arrivals and " + std::to_string(p.bytes) +
         " bytes";
}

void Hopper::all_know(Block& at) {
  Clock all(order_.of(0).size(), 0);
  for (int t = 0; t < threads_; ++t) Order::join(all, order_.of(member(at, t)));
  for (int t = 0; t < threads_; ++t) {
    order_.of(member(at, t)) = all;
    order_.tick(member(at, t));
  }
}

void Hopper::named_barrier(int name, int threads) {
  Fiber& own = block->current();
  if (mistake.name == "skip-named" && own.barriers++ == mistake.at) return;
  if (name < 1 || name > 15) fail("a barrier has a number from 1 to 15, not %d", name);
  meet(name, threads);
}

void Hopper::warp_barrier() {
  Fiber& own = block->current();
  if (mistake.name == "skip-warp" && own.barriers++ == mistake.at) return;
  meet(16 + int(own.thread.x) / 32, 32);
}

void Hopper::meet(int name, int threads) {
  const Fiber& own = block->current();
  Named& barrier = watched_[size_t(block->rank())].named[name];
  barrier.threads.push_back(int(own.thread.x));
  if (int(barrier.threads.size()) < threads) return block->yield(Waiting::named);
  std::vector<int> all;
  all.swap(barrier.threads);
  Clock known(order_.of(0).size(), 0);
  for (int t : all) Order::join(known, order_.of(member(*block, t)));
  for (int t : all) {
    order_.of(member(*block, t)) = known;
    order_.tick(member(*block, t));
    if (t != int(own.thread.x)) block->wake(t);
  }
}

void Hopper::cluster_barrier() {
  if (mistake.name == "skip-cluster" && block->current().barriers++ == mistake.at) return;
  if (++at_cluster_ < threads_ * int(watched_.size())) return block->yield(Waiting::cluster);
  at_cluster_ = 0;
  Clock all(order_.of(0).size(), 0);
  for (int i = 0; i < engines_; ++i) Order::join(all, order_.of(i));
  for (int i = 0; i < engines_; ++i) {
    order_.of(i) = all;
    order_.tick(i);
  }
  for (Watched& w : watched_)
    for (int t = 0; t < threads_; ++t)
      if (w.block->fiber(t).waiting == Waiting::cluster) w.block->wake(t);
}

// Ends -------------------------------------------------------------------------------------------

void Hopper::ends() {
  const Lane& lane = group().lanes[block->current().thread.x % 128];
  if (!lane.kept.empty()) fail("ends with products that it never waited for");
}

void Hopper::finish() const {
  if (!bulks_.empty()) fail("%zu bulk copies are on their way when all has ended", bulks_.size());
}

}  // namespace hetconv::host
