// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <random>

#include "hopper_machine.h"

namespace hetconv::host {

Block* block = nullptr;
Dim block_index, grid_size, block_size;
unsigned seed = 0;
Mistake mistake;

namespace {

constexpr size_t kStack = 64 << 10;

// A place to go back to: where a fiber stopped, on its own stack. The builtins switch without the
// system calls of swapcontext.
struct Context {
  ucontext_t begin;
  void* place[5];
};
Context main_context;

struct Place {
  Block* block;
  int thread;
};

}  // namespace

// Whose turn is next: any thread that waits for nothing.
struct Turns {
  std::vector<Place> ready;
  std::vector<Block*> blocks;
  std::function<void()> kernel;
  std::mt19937 lot;
  int left = 0, favoured = -1;

  Place take() {
    // Copies land late: when nobody can go on without them, or by lot.
    Hopper* hopper = blocks[0]->hopper;
    if (hopper && draw(16) == 0) hopper->land_one();
    while (ready.empty())
      if (!hopper || !hopper->land_one()) deadlock();
    size_t drawn = lot() % ready.size();
    for (int again = 0; again < 8 && !favours(*ready[drawn].block); ++again)
      drawn = lot() % ready.size();
    std::swap(ready[drawn], ready.back());
    const Place next = ready.back();
    ready.pop_back();
    return next;
  }

  [[noreturn]] void deadlock() const {
    for (Block* b : blocks)
      for (const Fiber& f : b->fibers_) {
        if (f.done || f.waiting == Waiting::barrier) continue;
        const unsigned t = f.thread.x;
        if (f.waiting == Waiting::warp)
          fail("deadlock: thread %u waits for its warp at %s, others are elsewhere", t,
               b->warps_[t / 32].instruction);
        if (f.waiting == Waiting::phase)
          fail("deadlock: thread %u of block %d waits for a phase of the barrier at %u, %s", t,
               b->rank_, f.place, b->hopper->state(*b, f.place).c_str());
        fail("deadlock: thread %u of block %d waits for %s", t, b->rank_,
             f.waiting == Waiting::warpgroup ? "its warpgroup"
             : f.waiting == Waiting::named   ? "a named barrier"
             : f.waiting == Waiting::copies  ? "its copies"
                                             : "its cluster");
      }
    fail("deadlock: a barrier that not all threads come to");
  }
};
static Turns turns;

unsigned draw(unsigned count) { return unsigned(turns.lot()) % count; }

bool favours(const Block& b) { return turns.favoured < 0 || turns.favoured == b.rank(); }

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "block (%u, %u)", block_index.x, block_index.y);
  if (block) std::fprintf(stderr, " thread %u", block->current().thread.x);
  std::fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

// No sanitizer in what switches stacks: it would take the jump for one up its own.
#define SWITCHES __attribute__((noinline, no_sanitize_address))

struct Start {
  static SWITCHES void enter() {
    Block& b = *block;
    turns.kernel();
    Fiber& own = b.current();
    if (!own.copies.empty() || own.awaited) fail("ends with copies that it never waited for");
    if (b.hopper) b.hopper->ends();
    own.done = true;
    --b.left_;
    if (--turns.left == 0) __builtin_longjmp(main_context.place, 1);
    b.yield(Waiting::nothing);
    std::abort();
  }
  static SWITCHES void begin(Block* b, int thread) { b->resume(thread); }
};

Block::Block(int threads, int64_t shared, Dim index, int rank)
    : index(index),
      fibers_(threads),
      warps_((threads + 31) / 32),
      memory_(shared),
      granules_((shared + 1) / 2),
      left_(threads),
      rank_(rank) {
  // NaN in every format, if anyone should get to see it.
  std::fill(memory_.begin(), memory_.end(), char(0xFF));
  if (threads % 32) fail("%d threads are no whole warps", threads);
  for (int i = 0; i < threads; ++i) {
    fibers_[i].thread = {unsigned(i), 0, 0};
    fibers_[i].stack.reset(new char[kStack]);
    fibers_[i].context = new Context;
  }
}

Block::~Block() {
  for (Fiber& f : fibers_) delete static_cast<Context*>(f.context);
}

void run(const std::vector<Block*>& blocks, unsigned seed, const std::function<void()>& kernel) {
  turns.lot.seed(seed);
  turns.favoured = int(seed % (blocks.size() + 1)) - 1;
  turns.blocks = blocks;
  turns.kernel = kernel;
  turns.ready.clear();
  turns.left = 0;
  for (Block* b : blocks)
    for (int i = 0; i < b->threads(); ++i) turns.ready.push_back({b, i}), ++turns.left;
  static Place first;
  first = turns.take();
  if (__builtin_setjmp(main_context.place) == 0) Start::begin(first.block, first.thread);
  block = nullptr;
}

SWITCHES void Block::resume(int next) {
  now_ = next;
  block = this;
  block_index = index;
  Fiber& f = fibers_[next];
  Context& c = *static_cast<Context*>(f.context);
  if (f.started) __builtin_longjmp(c.place, 1);
  f.started = true;
  getcontext(&c.begin);
  c.begin.uc_stack.ss_sp = f.stack.get();
  c.begin.uc_stack.ss_size = kStack;
  c.begin.uc_link = nullptr;
  makecontext(&c.begin, Start::enter, 0);
  setcontext(&c.begin);
  std::abort();
}

void Block::wake(int thread) {
  fibers_[thread].waiting = Waiting::nothing;
  turns.ready.push_back({this, thread});
}

SWITCHES void Block::yield(Waiting why) {
  Fiber& own = current();
  own.waiting = why;
  const Place next = turns.take();
  if (next.block == this && &fibers_[next.thread] == &own) return;
  Context& c = *static_cast<Context*>(own.context);
  if (__builtin_setjmp(c.place) == 0) next.block->resume(next.thread);
}

void Block::barrier() {
  Fiber& own = current();
  if (mistake.name == "skip-barrier" && own.barriers++ == mistake.at) return;
  if (++at_barrier_ == int(fibers_.size())) {
    at_barrier_ = 0;
    ++epoch_;
    if (hopper) hopper->all_know(*this);
    for (Fiber& f : fibers_)
      if (f.waiting == Waiting::barrier) wake(int(f.thread.x));
    return;
  }
  if (left_ != int(fibers_.size())) fail("a barrier after other threads have ended");
  yield(Waiting::barrier);
}

LaneArguments& Block::together(const char* instruction, const LaneArguments& own,
                               void (*all)(Block&, Warp&)) {
  const int thread = int(current().thread.x), lane = thread % 32;
  Warp& warp = warps_[thread / 32];
  if (warp.arrived && std::strcmp(warp.instruction, instruction))
    fail("its warp is divided: %s here, %s elsewhere", instruction, warp.instruction);
  warp.instruction = instruction;
  warp.lanes[lane] = own;
  if (++warp.arrived == 32) {
    all(*this, warp);
    warp.arrived = 0;
    const int begin = thread - lane;
    for (int i = begin; i < begin + 32; ++i)
      if (i != thread) wake(i);
  } else {
    yield(Waiting::warp);
  }
  return warp.lanes[lane];
}

uint32_t Block::offset(uint32_t address, int64_t bytes, int alignment, const char* what) const {
  if (address % alignment)
    fail("%s of %lld bytes at %u is not aligned", what, (long long)bytes, address);
  const int64_t offset = int64_t(address) - begin();
  if (offset < 0 || offset + bytes > int64_t(memory_.size()))
    fail("%s at %lld is outside of %zu bytes of shared memory", what, (long long)offset,
         memory_.size());
  return uint32_t(offset);
}

void Block::read(uint32_t address, void* to, int bytes) {
  read_as(int(current().thread.x), address, to, bytes);
}

void Block::read_as(int thread, uint32_t address, void* to, int bytes) {
  const uint32_t begin = offset(address, bytes, bytes, "a read");
  if (hopper) {
    hopper->read(*this, thread, begin, bytes);
    std::memcpy(to, memory(begin), size_t(bytes));
    return;
  }
  for (uint32_t i = begin / 2; i < (begin + bytes) / 2; ++i) {
    Granule& g = granules_[i];
    if (g.coming) fail("reads shared byte %u while a copy is on its way there", i * 2);
    if (g.writer < 0) fail("reads shared byte %u, which nobody has written", i * 2);
    if (g.written == epoch_ && g.writer != thread)
      fail("race: reads shared byte %u, written by thread %d since the last barrier", i * 2,
           g.writer);
    g.many = g.read == epoch_ && (g.many || g.reader != thread);
    g.read = epoch_;
    g.reader = thread;
  }
  std::memcpy(to, memory(begin), size_t(bytes));
}

void Block::note_write(int thread, uint32_t offset, int bytes) {
  if (hopper) return hopper->write(*this, thread, offset, bytes);
  for (uint32_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Granule& g = granules_[i];
    if (g.written == epoch_ && g.writer != thread)
      fail("race: writes shared byte %u, as thread %d did since the last barrier", i * 2, g.writer);
    if (g.read == epoch_ && (g.many || g.reader != thread))
      fail("race: writes shared byte %u, read by thread %d since the last barrier", i * 2,
           g.reader);
    g.writer = thread;
    g.written = epoch_;
  }
}

void Block::write(uint32_t address, const void* from, int bytes) {
  write_as(int(current().thread.x), address, from, bytes);
}

void Block::write_as(int thread, uint32_t address, const void* from, int bytes) {
  const uint32_t begin = offset(address, bytes, bytes, "a write");
  for (uint32_t i = begin / 2; i < (begin + bytes) / 2; ++i)
    if (granules_[i].coming) fail("writes shared byte %u while a copy is on its way there", i * 2);
  note_write(thread, begin, bytes);
  std::memcpy(memory(begin), from, size_t(bytes));
}

void Block::copy(uint32_t address, const void* source) {
  if (mistake.name == "skip-copy" && copies_++ == mistake.at) return;
  const uint32_t begin = offset(address, 16, 16, "a copy");
  if (uintptr_t(source) % 16) fail("a copy from %p, which is not aligned", source);
  note_write(int(current().thread.x), begin, 16);
  if (hopper) hopper->coming(*this, begin, true);
  for (uint32_t i = begin / 2; i < begin / 2 + 8; ++i) {
    if (granules_[i].coming) fail("copies to shared byte %u twice at a time", i * 2);
    granules_[i].coming = 1;
  }
  current().copies.push_back({begin, source, current().groups});
}

void Block::commit() { ++current().groups; }

void Block::wait(int pending) {
  Fiber& own = current();
  if (mistake.name == "skip-wait" && own.waits++ == mistake.at) return;
  std::vector<Copy> later;
  for (const Copy& c : own.copies)
    if (c.group < own.groups - pending)
      land(own, c);
    else
      later.push_back(c);
  own.copies = later;
  if (hopper) hopper->copies_wait(own.groups - pending);
}

void Block::land(Fiber& fiber, const Copy& c) {
  if (hopper) hopper->coming(*this, c.offset, false);
  note_write(int(fiber.thread.x), c.offset, 16);
  put(c);
}

void Block::put(const Copy& c) {
  for (uint32_t i = c.offset / 2; i < c.offset / 2 + 8; ++i) granules_[i].coming = 0;
  if (c.source)
    std::memcpy(memory(c.offset), c.source, 16);
  else
    std::memset(memory(c.offset), 0, 16);
}

}  // namespace hetconv::host
